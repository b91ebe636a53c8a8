// What the reader has chosen, and what follows from it.

const S = {
  on: RUNS.map(() => true), // the checkbox of each run
  words: "",
  states: new Set(RUNS.map((run) => run.state)),
  sort: { by: null, down: false },
  colour: "run",
  metric: null,
  step: 0,
  kind: null,
  cards: 24,
};
let order = ALL.slice(); // of the rows

const hay = RUNS.map((run, i) => {
  const overrides = DATA.varying.flatMap((column) => [
    `${column.key}=${show(column.values[i])}`,
    `${column.name}=${show(column.values[i])}`,
  ]);
  return [run.name, run.folder, run.state, run.cause, run.facts.wandb ?? "", ...run.overrides, ...overrides]
    .join("\n")
    .toLowerCase();
});

// A word of the filter as a test of a run: text that occurs, -text that does not, or name<number and the like.
function test(word) {
  if (word.length > 1 && word[0] === "-") {
    const other = test(word.slice(1));
    return (i) => !other(i);
  }
  const [, name, sign, text] = /^([^<>=]+)(<=|>=|<|>|=)(.*)$/.exec(word) ?? [];
  const what =
    name &&
    [
      ...DATA.varying.map((column) => [`varying:${column.key}`, column.key, column.name]),
      ...DATA.columns.map((column) => [`number:${column.name}`, column.name, column.name]),
    ].find(([, key, short]) => key.toLowerCase() === name || short.toLowerCase() === name)?.[0];
  if (!what || text === "") return (i) => hay[i].includes(word);
  const wanted = Number(text);
  return (i) => {
    const value = valueOf(i, what);
    if (sign === "=") return String(value).toLowerCase() === text || (isNumber(value) && value === wanted);
    if (!isNumber(value)) return false;
    return { "<": value < wanted, ">": value > wanted, "<=": value <= wanted, ">=": value >= wanted }[sign];
  };
}

let passing = RUNS.map(() => true);

function refilter() {
  const tests = S.words.toLowerCase().split(/\s+/).filter(Boolean).map(test);
  passing = ALL.map((i) => S.states.has(RUNS[i].state) && tests.every((passes) => passes(i)));
}

function listed() {
  return order.filter((i) => passing[i]);
}

function shown() {
  return listed().filter((i) => S.on[i]);
}

// --- colours of runs ---

// How runs are coloured: {of(i), scale}; `scale` is what the legend says about it.
let colours = null;

function recolour() {
  if (S.colour === "run") {
    colours = { of: hue, dash: (i) => DASHES[Math.floor(i / 8) % DASHES.length], scale: null };
    return;
  }
  const measured = S.colour.startsWith("number:"); // of a run that diverged such a value is the text "nan"
  const values = ALL.map((i) => valueOf(i, S.colour)).map((value) => (measured && !isNumber(value) ? null : value));
  const solid = () => "solid";
  const grey = color("quiet");
  if (values.some((value) => value !== null) && values.every((value) => value === null || isNumber(value))) {
    const known = values.filter(isNumber);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const log = low > 0 && high / low >= 30;
    const at = (value) =>
      high === low ? 0.5 : log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    colours = { of: (i) => (values[i] === null ? grey : shade(at(values[i]))), dash: solid, scale: { low, high, log } };
    return;
  }
  const names = values.map((value) => (value === null ? "–" : show(value)));
  const classes = [...new Set(names)];
  colours = {
    of: (i) => hue(classes.indexOf(names[i])),
    dash: (i) => DASHES[Math.floor(classes.indexOf(names[i]) / 8) % 4],
    scale: { classes },
  };
}

// --- panels are drawn when they are on the screen and something has changed ---

const panels = [];
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const panel = panels.find((one) => one.section === entry.target);
      panel.near = entry.isIntersecting;
    }
    draw();
  },
  { rootMargin: "300px" },
);

function addPanel(id, paint) {
  const panel = { id, section: byId(id), paint, near: false, stale: true };
  panels.push(panel);
  watcher.observe(panel.section);
}

function draw() {
  for (const panel of panels) {
    if (panel.near && panel.stale && !panel.section.hidden) {
      panel.stale = false;
      panel.paint();
    }
  }
}

let waiting = false;

// Have panels drawn again soon; several changes in a row are one.
function redraw(...ids) {
  for (const panel of panels) if (!ids.length || ids.includes(panel.id)) panel.stale = true;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() =>
    setTimeout(() => {
      waiting = false;
      draw();
    }),
  );
}
