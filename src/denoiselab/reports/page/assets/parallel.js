// Parallel coordinates: an axis for each override that differs, the last one for a number; a line for each run.

const MOST_AXES = 9;

function startParallel() {
  const columns = DATA.columns.filter((column) => column.values.filter(isNumber).length > 1);
  if (!DATA.varying.length || RUNS.length < 3 || !columns.length) {
    byId("parallel").hidden = true;
    return;
  }
  const first = DATA.sweep?.metric || columns.find((column) => wanted.has(column.name))?.name;
  fill(
    byId("target"),
    columns.map((column) => [column.name, column.name]),
    first,
  );
  byId("target").addEventListener("change", () => redraw("parallel"));
  addPanel("parallel", paintParallel);
}

// Where values lie on an axis from 0 to 1, and its ticks: numbers by size, words in their order.
function scaleOf(values) {
  const known = values.filter((value) => value !== null);
  if (known.length && known.every(isNumber)) {
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const log = low > 0 && high / low >= 30;
    const place = (value) =>
      high === low ? 0.5 : log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    const distinct = [...new Set(known)].sort((a, b) => a - b);
    const spread = [0, 0.25, 0.5, 0.75, 1].map((share) =>
      log ? low * (high / low) ** share : low + (high - low) * share,
    );
    const ticks = (distinct.length <= 6 ? distinct : spread).map((value) => [place(value), show(value)]);
    return { place, ticks: apartEnough(ticks), log };
  }
  const words = [...new Set(known.map(show))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const place = (value) => (words.length === 1 ? 0.5 : words.indexOf(show(value)) / (words.length - 1));
  return { place, ticks: words.length <= 20 ? words.map((word) => [place(word), word]) : [] };
}

// Ticks that would lie on one another are left out.
function apartEnough(ticks) {
  return ticks.reduce((kept, tick) => (kept.length && tick[0] - kept.at(-1)[0] < 0.045 ? kept : [...kept, tick]), []);
}

function cut(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

function paintParallel() {
  const column = COLUMNS.get(byId("target").value);
  const some = shown().filter((i) => isNumber(column.values[i]));
  // Of numbers that must not be compared, those of the kind that most runs have
  const kinds = [...grouped(some, (i) => kind(column, i)).values()].sort((a, b) => b.length - a.length);
  const runs = kinds[0] ?? [];
  const differing = DATA.varying.filter((one) => new Set(runs.map((i) => one.values[i])).size > 1);
  const axes = differing.slice(0, MOST_AXES - 1).map((one) => ({ name: one.name, values: one.values }));
  axes.push({ name: column.name, values: column.values });
  const scales = axes.map((one) => scaleOf(runs.map((i) => one.values[i])));
  const target = scales.at(-1);
  const traces = runs.map((i) => {
    const at = axes.map((one, k) => (one.values[i] === null ? null : scales[k].place(one.values[i])));
    const measured = `${column.name}=${show(column.values[i])}`;
    const paint = shade(target.place(column.values[i])); // as in the curves, coloured by this number
    return {
      type: "scatter",
      mode: "lines+markers",
      x: axes.map((_, k) => k),
      y: at,
      line: { color: paint, width: 1.5 },
      marker: { size: 4, color: paint },
      text: axes.map((one) => `${plain(`${one.name}=${show(one.values[i])}`)}<br>${plain(measured)}`),
      name: plain(title(i)),
      opacity: runs.length > 60 ? 0.6 : 0.9,
      hovertemplate: "<b>%{fullData.name}</b><br>%{text}<extra></extra>",
    };
  });
  const ticks = axes.flatMap((_, k) =>
    scales[k].ticks.map(([y, text]) => ({
      x: k,
      y,
      text: plain(cut(text, 18)),
      showarrow: false,
      xanchor: k === axes.length - 1 ? "left" : "right",
      xshift: k === axes.length - 1 ? 7 : -7,
      font: { size: 11, color: color("quiet") },
      bgcolor: color("card"),
    })),
  );
  plot(
    "axes",
    traces,
    layout({
      xaxis: axis({
        tickvals: axes.map((_, k) => k),
        ticktext: axes.map((one, k) => plain(cut(one.name, 24)) + (scales[k].log ? " (log)" : "")),
        side: "top",
        range: [-0.25, axes.length - 0.75],
        gridcolor: color("quiet"),
        zeroline: false,
        fixedrange: true,
      }),
      yaxis: axis({ visible: false, range: [-0.06, 1.06], fixedrange: true }),
      margin: {
        l: 24 + 6.5 * Math.max(...scales[0].ticks.map(([, text]) => cut(text, 18).length), 0),
        r: 70,
        t: 46,
        b: 14,
      },
      annotations: ticks,
    }),
    runs,
  );
  const rest = some.length - runs.length;
  const more = differing.length - (axes.length - 1);
  const said = [
    rest ? `${rest} of the runs that are shown ${rest === 1 ? "is" : "are"} left out: ${column.unlike}.` : "",
    more > 0 ? `${more} further overrides have no axis.` : "",
  ].filter(Boolean);
  byId("partial").textContent = said.join(" ");
  byId("partial").hidden = !said.length;
}
