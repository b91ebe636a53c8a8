// The data of the page, and what is computed of it.
// Everything in it may be somebody else's: it is shown as text, never as HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const ALL = RUNS.map((_, i) => i);

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

const stepsOf = DATA.steps.map(() => null);

function steps(number) {
  return (stepsOf[number] ??= new Float64Array(bytes(DATA.steps[number]).buffer));
}

const unpacked = new Map();

// The curve of a run: {steps, values}; null where it has none.
function curve(i, metric) {
  const key = `${i} ${metric}`;
  if (!unpacked.has(key)) {
    const packed = Object.hasOwn(RUNS[i].curves, metric) ? RUNS[i].curves[metric] : null;
    unpacked.set(key, packed && { steps: steps(packed[0]), values: new Float32Array(bytes(packed[1]).buffer) });
  }
  return unpacked.get(key);
}

// Seconds of training at given steps, between the steps at which they were logged.
function seconds(i, at) {
  const packed = RUNS[i].clock;
  if (!packed) return null;
  const known = steps(packed[0]);
  const time = new Float32Array(bytes(packed[1]).buffer);
  const found = new Float64Array(at.length);
  let k = 0;
  for (let j = 0; j < at.length; j++) {
    while (k < known.length - 2 && known[k + 1] < at[j]) k++;
    const speed = (time[k + 1] - time[k]) / (known[k + 1] - known[k]);
    found[j] = Math.max(0, time[k] + speed * (at[j] - known[k]));
  }
  return found;
}

// Exponential average with the weight that is missing at the start made up for (Adam's correction); gaps stay gaps.
function smooth(values, factor) {
  if (!factor) return values;
  let sum = 0;
  let weight = 0;
  return Float64Array.from(values, (value) => {
    if (!Number.isFinite(value)) return NaN;
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

const METRICS = [...new Set(RUNS.flatMap((run) => Object.keys(run.curves)))].sort();

// Which letter a run has among runs whose numbers of this name may not be compared; "" where all may.
function kind(column, i) {
  return column.kinds ? column.kinds[i] : "";
}

// Columns of numbers, by name; those of plain facts follow them.
const COLUMNS = new Map(DATA.columns.map((column) => [column.name, column]));

// The value of a run in a column or under an override; null where there is none.
function valueOf(i, what) {
  const [group, name] = [what.slice(0, what.indexOf(":")), what.slice(what.indexOf(":") + 1)];
  if (group === "number") return COLUMNS.get(name)?.values[i] ?? null;
  return DATA.varying.find((column) => column.key === name)?.values[i] ?? null;
}

// Items by what `key` says of each, in the order in which they come.
function grouped(items, key) {
  const found = new Map();
  for (const item of items) {
    if (!found.has(key(item))) found.set(key(item), []);
    found.get(key(item)).push(item);
  }
  return found;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function show(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 10000 ? String(value) : value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(3);
  return Number(value.toPrecision(4)).toString();
}

function duration(total) {
  if (!isNumber(total)) return "–";
  if (total < 60) return `${Number(total.toPrecision(3))} s`;
  const minutes = Math.round(total / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}
