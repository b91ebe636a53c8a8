// Everything in its order.

function startHead() {
  document.title = `${DATA.title} – denoiselab report`;
  byId("title").textContent = DATA.title;
  const { length } = RUNS;
  byId("about").textContent = `${length === 1 ? "1 run" : `${length} runs`}, written ${DATA.made}`;
  const names = {
    runs: "runs",
    curves: "curves",
    samples: "samples",
    parallel: "overrides",
    frontier: "frontier",
    protocols: "protocols",
    differences: "configs",
  };
  for (const [id, name] of Object.entries(names)) {
    if (!byId(id).hidden) byId("nav").append(make("a", { href: `#${id}` }, name));
  }
  const themes = ["auto", "light", "dark"];
  byId("theme").addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    byId("theme").textContent = `theme: ${next}`;
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  byId("notes").hidden = !DATA.notes.length;
  byId("remarks").append(...DATA.notes.map((note) => make("li", {}, note)));
}

// All colours anew.
function repaint() {
  recolour();
  showRows();
  paintLegend();
  redraw();
}

function start() {
  wanted = firstColumns();
  startColours();
  startCauses();
  startTable();
  startCurves();
  startPictures();
  startParallel();
  startFrontier();
  startRecords();
  startDifferences();
  startHead();
  paintLegend();
}
