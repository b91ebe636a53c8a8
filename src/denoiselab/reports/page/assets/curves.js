// The curves: one metric of the runs that are shown, against steps or seconds of training.

const FEW = 40; // points, up to which each has a marker
const FAINT = 12; // runs, up to which a smoothed curve has the measured one behind it

function startCurves() {
  if (!METRICS.length) {
    byId("curves").hidden = true;
    return;
  }
  const asked = DATA.sweep?.metric;
  const grows = (name) => METRICS.includes(name) && RUNS.some((_, i) => curve(i, name)?.values.length > 1);
  const good = [asked, `metrics/${asked}`, "val/x0_mse", "train/loss"];
  const first = good.find(grows) ?? good.find((name) => METRICS.includes(name));
  fill(
    byId("metric"),
    METRICS.map((name) => [name, name, name.includes("/") ? name.slice(0, name.lastIndexOf("/")) : ""]),
    first,
  );
  S.metric = byId("metric").value;
  byId("against").querySelector("[value=seconds]").disabled = !RUNS.some((run) => run.clock);
  byId("metric").addEventListener("change", (event) => {
    S.metric = event.target.value;
    redraw("curves");
  });
  for (const id of ["against", "logy", "logx"]) byId(id).addEventListener("change", () => redraw("curves"));
  byId("smoothing").addEventListener("input", (event) => {
    byId("smoothed").textContent = event.target.value;
    redraw("curves");
  });
  addPanel("curves", paintCurves);
}

function startColours() {
  const pairs = [
    ["run", "run"],
    ...DATA.varying.map((column) => [`varying:${column.key}`, column.name, "override"]),
    ...DATA.columns
      .filter((column) => !column.unlike)
      .map((column) => [`number:${column.name}`, column.name, "number"]),
  ];
  const many = RUNS.length > 4 * HUES.light.length;
  const judged = DATA.columns.find((column) => column.name === DATA.sweep?.metric && !column.unlike);
  fill(
    byId("colour"),
    pairs,
    many && judged ? `number:${judged.name}` : many && pairs.length > 1 ? pairs[1][0] : "run",
  );
  S.colour = byId("colour").value;
  byId("colour").addEventListener("change", (event) => {
    S.colour = event.target.value;
    recolour();
    showRows();
    paintLegend();
    redraw();
  });
  recolour();
}

function paintCurves() {
  const runs = shown();
  const time = byId("against").value === "seconds";
  const factor = Number(byId("smoothing").value);
  const traces = [];
  const of = [];
  let never = 0;
  const broken = { x: [], y: [], text: [], color: [] };
  const unit = time ? "%{x:.4~g} s" : "step %{x:,}";
  const hover = `<b>%{fullData.name}</b><br>${unit}: %{y:.6~g}<extra></extra>`;
  for (const i of runs) {
    const found = curve(i, S.metric);
    const x = found && (time ? seconds(i, found.steps) : found.steps);
    if (!x) continue;
    const line = { color: colours.of(i), width: runs.length > 60 ? 1 : 1.6, dash: colours.dash(i) };
    const name = plain(title(i));
    if (factor && runs.length <= FAINT) {
      traces.push({
        type: "scatter",
        mode: "lines",
        x,
        y: found.values,
        line: { ...line, width: 1, dash: "solid" },
        opacity: 0.25,
        hoverinfo: "skip",
      });
      of.push(i);
    }
    const y = smooth(found.values, factor);
    const few = found.values.length <= FEW;
    traces.push({
      type: "scatter",
      mode: few ? "lines+markers" : "lines",
      x,
      y,
      line,
      marker: { color: line.color, size: 5 },
      name,
      hovertemplate: hover,
    });
    of.push(i);
    const bad = found.values.findIndex((value) => !Number.isFinite(value));
    const near = bad > 0 ? bad - 1 : found.values.findIndex(Number.isFinite); // where a mark can be
    if (bad >= 0 && near < 0) never++;
    if (bad >= 0 && near >= 0) {
      broken.x.push(x[near]);
      broken.y.push(y[near]);
      broken.text.push(`${name}<br>not finite at step ${show(found.steps[bad])}`);
      broken.color.push(line.color);
    }
  }
  if (broken.x.length) {
    traces.push({
      type: "scatter",
      mode: "markers",
      x: broken.x,
      y: broken.y,
      text: broken.text,
      hovertemplate: "%{text}<extra></extra>",
      marker: { symbol: "x", size: 10, color: broken.color },
    });
    of.push(null);
  }
  const without = runs.length - new Set(of.filter((i) => i !== null)).size;
  const logs = [byId("logx").checked, byId("logy").checked];
  plot(
    "curve",
    traces,
    layout({
      xaxis: axis({
        title: { text: time ? "seconds of training, without validation and sampling" : "optimizer steps" },
        type: logs[0] ? "log" : "linear",
      }),
      yaxis: axis({ title: { text: plain(S.metric) }, type: logs[1] ? "log" : "linear" }),
      uirevision: [S.metric, time, ...logs].join(), // toggling a run keeps the zoom
      annotations: traces.length ? [] : [remark(runs.length ? "no run that is shown has logged this" : "no run is shown")],
    }),
    of,
  );
  const said = [
    Object.hasOwn(DATA.unlike, S.metric)
      ? `≠ ${DATA.unlike[S.metric]}. These curves are not to be compared as they stand.`
      : "",
    without && traces.length
      ? `${without} of the runs that are shown ${without === 1 ? "has" : "have"} not logged ${time ? "this, or not its seconds" : "this"}.`
      : "",
    never ? `✗ of ${never} of the runs that are shown no value of this is finite.` : "",
  ].filter(Boolean);
  byId("meaning").textContent = said.join(" ");
  byId("meaning").hidden = !said.length;
}

// A button for each run that is listed, in the order of the table.
function paintLegend() {
  const legend = byId("legend");
  const kept = document.activeElement?.closest?.("#legend [data-run]")?.dataset.run;
  legend.replaceChildren(
    ...listed().map((i) => {
      const swatch = make("span", { class: "swatch" });
      swatch.style.borderColor = colours.of(i);
      swatch.style.borderTopStyle = { solid: "solid", dash: "dashed", dot: "dotted", dashdot: "dashed" }[
        colours.dash(i)
      ];
      const click = (event) => (event.shiftKey ? only(i) : toggle(i, !S.on[i]));
      return make(
        "button",
        {
          type: "button",
          "data-run": i,
          "aria-pressed": String(S.on[i]),
          title: `${title(i)}\nShift: this one alone`,
          onclick: click,
          ...pointsAt(i),
        },
        swatch,
        make("span", {}, title(i)),
      );
    }),
  );
  if (kept !== undefined) legend.querySelector(`[data-run="${kept}"]`)?.focus();
  paintScale();
}

function paintScale() {
  const { scale } = colours;
  const place = byId("scale");
  place.replaceChildren();
  if (!scale) return;
  const name = byId("colour").selectedOptions[0].textContent;
  if (scale.classes) {
    place.append(
      make("div", {}, name),
      make(
        "div",
        { class: "classes" },
        ...scale.classes.map((text, k) => {
          const swatch = make("span", { class: "swatch" });
          swatch.style.borderColor = hue(k);
          return make("span", {}, swatch, text);
        }),
      ),
    );
    return;
  }
  const bar = make("div", { class: "bar" });
  bar.style.background = `linear-gradient(to right, ${Array.from({ length: 9 }, (_, k) => shade(k / 8)).join(", ")})`;
  place.append(
    make("div", {}, `${name}${scale.log ? ", logarithmic" : ""}`),
    bar,
    make("div", { class: "ends" }, make("span", {}, show(scale.low)), make("span", {}, show(scale.high))),
  );
}
