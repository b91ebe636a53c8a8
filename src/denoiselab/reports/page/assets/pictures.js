// Sample grids: one slider over the steps of all runs, two runs beside each other, and all runs that are shown.

const KINDS = [...new Set(RUNS.flatMap((run) => Object.keys(run.pictures)))].sort(
  (a, b) => rank(a) - rank(b) || (a < b ? -1 : 1),
);
let slider = [];

// Averages first, then the raw weights, then other pictures.
function rank(name) {
  return name.includes("_") ? 2 : name === "raw" ? 1 : 0;
}

function startPictures() {
  if (!KINDS.length) {
    byId("samples").hidden = true;
    return;
  }
  fill(
    byId("kind"),
    KINDS.map((name) => [name, name]),
    KINDS[0],
  );
  S.kind = KINDS[0];
  const drawn = ALL.filter((i) => Object.keys(RUNS[i].pictures).length);
  const second = drawn.length > 1 ? drawn[1] : drawn[0];
  byId("pair").append(
    half("left", drawn[0], KINDS[0]),
    half("right", second, second === drawn[0] && KINDS[1] ? KINDS[1] : KINDS[0]),
  );
  slider = [
    ...new Set(RUNS.flatMap((run) => Object.values(run.pictures).flatMap((series) => series.map(([step]) => step)))),
  ].sort((a, b) => a - b);
  const range = byId("step");
  range.max = slider.length - 1;
  range.value = range.max;
  S.step = slider.at(-1);
  range.addEventListener("input", () => {
    S.step = slider[range.value];
    moveTo();
  });
  byId("kind").addEventListener("change", (event) => {
    S.kind = event.target.value;
    redraw("samples");
  });
  if (Object.hasOwn(DATA.common, "callbacks.pictures.seed"))
    byId("noise").textContent = "All are drawn from the same noise.";
  byId("more").addEventListener("click", () => {
    S.cards = Infinity;
    redraw("samples");
  });
  moveTo();
  addPanel("samples", paintPictures);
}

// The picture of a run at a step: the newest one up to it; null where there is none yet.
function pictureAt(i, name, step) {
  const series = Object.hasOwn(RUNS[i].pictures, name) ? RUNS[i].pictures[name] : [];
  return series.filter(([at]) => at <= step).at(-1) ?? null;
}

function half(side, i, name) {
  const runs = make("select", { id: `${side}run`, "aria-label": `${side} run` });
  fill(runs, runPairs(), i);
  const kinds = make("select", { id: `${side}kind`, "aria-label": `${side} weights` });
  fill(
    kinds,
    KINDS.map((one) => [one, one]),
    name,
  );
  const paint = () => paintFigure(byId(side), Number(runs.value), kinds.value);
  for (const one of [runs, kinds]) one.addEventListener("change", paint);
  const figure = make(
    "figure",
    { id: side },
    make("figcaption", {}, runs, kinds, make("span", { class: "at quiet" })),
    make("div", { class: "none" }),
    make("img", { alt: "", hidden: true }),
  );
  figure.paint = paint;
  return figure;
}

function paintFigure(figure, i, name) {
  const found = pictureAt(i, name, S.step);
  const [image, none] = [figure.querySelector("img"), figure.querySelector(".none")];
  image.hidden = !found;
  none.hidden = Boolean(found);
  figure.querySelector(".at").textContent = found ? `step ${show(found[0])}` : "";
  if (found) {
    const source = `data:image/png;base64,${found[1]}`;
    if (image.getAttribute("src") !== source) image.src = source;
    image.alt = `samples of ${title(i)}, ${name} weights, step ${found[0]}`;
  } else {
    none.textContent = Object.hasOwn(RUNS[i].pictures, name)
      ? "nothing drawn up to this step"
      : `no pictures of ${name}`;
  }
}

function card(i) {
  const about = make("figcaption", {}, make("span", { class: "name" }, title(i)), make("span", { class: "at quiet" }));
  return make(
    "figure",
    { "data-run": i, ...pointsAt(i) },
    about,
    make("div", { class: "none" }),
    make("img", { alt: "", hidden: true }),
  );
}

function paintPictures() {
  const runs = shown().filter((i) => Object.hasOwn(RUNS[i].pictures, S.kind));
  const first = runs.slice(0, S.cards);
  byId("pictures").replaceChildren(...first.map(card));
  byId("more").hidden = first.length === runs.length;
  byId("more").textContent = `show all ${runs.length}`;
  moveTo();
}

function moveTo() {
  const at = slider.indexOf(S.step);
  byId("step").setAttribute("aria-valuetext", `step ${S.step}`);
  byId("stepped").textContent = `${show(S.step)} (${at + 1} of ${slider.length})`;
  for (const side of ["left", "right"]) byId(side).paint();
  for (const figure of byId("pictures").children) paintFigure(figure, Number(figure.dataset.run), S.kind);
}
