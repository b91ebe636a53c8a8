// Small parts of the page: elements with text, selects, colours.

function byId(id) {
  return document.getElementById(id);
}

// An element with attributes, properties that begin with "on", and children that are elements or text.
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Fill a select with [value, text] pairs, in groups where a third item names one; the first is chosen if `chosen` is none.
function fill(select, pairs, chosen) {
  const groups = new Map();
  for (const [value, text, group = ""] of pairs) {
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(make("option", { value }, text));
  }
  select.replaceChildren();
  for (const [group, options] of groups)
    select.append(...(group ? [make("optgroup", { label: group }, ...options)] : options));
  const values = pairs.map(([value]) => String(value));
  select.value = values.includes(String(chosen)) ? chosen : values[0];
}

function runPairs() {
  return RUNS.map((run, i) => [i, title(i)]);
}

function title(i) {
  const { number, name } = RUNS[i];
  return number === null ? name : `${number}: ${name}`;
}

// Eight hues after Okabe & Ito, told apart by most colour-blind readers, in the order of the runs; then they are dashed.
const HUES = {
  light: ["#0072b2", "#d55e00", "#00815d", "#b8487f", "#9a6d00", "#2b8fcc", "#7346c0", "#4d5560"],
  dark: ["#56b4f5", "#ff8f4a", "#35d3a4", "#f29bcb", "#f0c546", "#9ad7ff", "#bda3f7", "#c6ccd3"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
// Viridis, which colour-blind readers can follow too, without the end that the background would swallow.
const VIRIDIS = [
  "#440154",
  "#482878",
  "#3e4989",
  "#31688e",
  "#26828e",
  "#1f9e89",
  "#35b779",
  "#6ece58",
  "#b5de2b",
  "#fde725",
];

function isDark() {
  const forced = document.documentElement.dataset.theme;
  return forced ? forced === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function hue(number) {
  const hues = HUES[isDark() ? "dark" : "light"];
  return hues[number % hues.length];
}

function shade(share) {
  const [from, to] = isDark() ? [2.5, 9] : [0, 7];
  const place = from + (to - from) * Math.min(1, Math.max(0, share));
  const low = Math.floor(place);
  const high = Math.min(low + 1, 9);
  const mixed = [1, 3, 5].map((at) => {
    const [a, b] = [low, high].map((k) => parseInt(VIRIDIS[k].slice(at, at + 2), 16));
    return Math.round(a + (b - a) * (place - low));
  });
  return `rgb(${mixed.join(",")})`;
}

const probe = make("span", { hidden: true });
document.body.append(probe);

// The colour that a variable of the style sheet stands for now.
function color(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

// Text for Plotly, which reads some HTML in it: here it is nothing but text.
function plain(text) {
  return String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
}

const SIGNS = {
  running: "▶",
  finished: "✓",
  failed: "✗",
  preempted: "‖",
  interrupted: "■",
  stopped: "■",
  pruned: "✂",
  queued: "…",
  unknown: "?",
};

function badge(i) {
  const { state } = RUNS[i];
  const tone = state === "failed" ? "bad" : state === "finished" ? "good" : state === "running" ? "" : "warn";
  return make("span", { class: tone }, `${SIGNS[state]} ${state}`);
}

// What is odd about a run though it may have finished.
function oddities(i) {
  const { facts } = RUNS[i];
  const found = [];
  if (facts.not_finite !== undefined) found.push(`loss not finite at step ${show(facts.not_finite)}`);
  if (facts.incidents) found.push(facts.incidents === 1 ? "1 incident" : `${facts.incidents} incidents`);
  return found;
}
