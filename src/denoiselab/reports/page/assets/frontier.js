// The frontier of a run: its number against network evaluations, and against milliseconds.

const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "cross", "x", "star"];
const FRONTIERS = RUNS.flatMap((run, i) => run.frontiers.map((one) => ({ i, ...one })));

function startFrontier() {
  if (!FRONTIERS.length) {
    byId("frontier").hidden = true;
    return;
  }
  fill(
    byId("which"),
    FRONTIERS.map((one, k) => [k, `${one.metric} of ${title(one.i)} (${one.name})`]),
    0,
  );
  byId("which").addEventListener("change", () => redraw("frontier"));
  addPanel("frontier", paintFrontier);
}

const COSTS = [
  { key: "nfe", mark: "front_nfe", unit: 1, text: "network evaluations per image, guidance included", x: "x", y: "y" },
  { key: "seconds", mark: "front_seconds", unit: 1000, text: "milliseconds per image", x: "x2", y: "y2" },
];

// Ticks of a logarithmic axis, from a decade below its values to one above them; fewer a decade where it is long.
function ticksOf(low, high) {
  const digits = high / low > 15 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 6, 8];
  const [first, last] = [Math.floor(Math.log10(low)) - 1, Math.ceil(Math.log10(high)) + 1];
  return Array.from({ length: last - first + 1 }, (_, k) => digits.map((d) => d * 10 ** (first + k))).flat();
}

function paintFrontier() {
  const { points, metric } = FRONTIERS[Number(byId("which").value)];
  const good = points.filter((point) => [point.nfe, point.seconds, point.value].every(isNumber));
  if (!good.length) {
    plot("front", [], layout({ annotations: [remark("no point of it has finite numbers")] }), []);
    return;
  }
  const samplers = [...new Set(good.map((point) => point.sampler))];
  const scales = [...new Set(good.map((point) => point.scale))].sort((a, b) => a - b);
  const traces = [];
  const positive = good.every((point) => point.value > 0);
  const floor = good.find((point) => isNumber(point.real))?.real;
  const real = positive && !(floor > 0) ? undefined : floor; // an extrapolated one may lie below zero
  const values = good.map((point) => point.value);
  const [low, high] = [Math.min(...values, real ?? Infinity), Math.max(...values, real ?? -Infinity)];
  // By the values: an interval that reaches below zero would take a logarithmic axis with it
  const range = positive ? { type: "log", range: [Math.log10(low / 1.4), Math.log10(high * 1.3)] } : { type: "linear" };
  const y = axis({
    ...range,
    title: { text: plain(metric) },
    tickformat: "~g",
    tickvals: positive ? ticksOf(low, high) : undefined,
  });
  const costs = (cost) => {
    const spent = good.map((point) => point[cost.key]);
    const tickvals = ticksOf(Math.min(...spent) * cost.unit, Math.max(...spent) * cost.unit);
    return { type: "log", tickvals, tickformat: "~g", title: { text: cost.text } };
  };
  for (const cost of COSTS)
    traces.push(...linesOf(good, cost, samplers, scales, positive ? low / 100 : -Infinity), ...frontOf(good, cost));
  plot(
    "front",
    traces,
    layout({
      xaxis: axis({ ...costs(COSTS[0]), domain: [0, 0.47] }),
      xaxis2: axis({ ...costs(COSTS[1]), domain: [0.53, 1], anchor: "y2" }),
      yaxis: y,
      yaxis2: { ...y, matches: "y", anchor: "x2", title: { text: "" } },
      showlegend: true,
      legend: { orientation: "v", font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" },
      shapes:
        real === undefined
          ? []
          : COSTS.map((cost) => ({
              type: "line",
              xref: `${cost.x} domain`,
              yref: cost.y,
              x0: 0,
              x1: 1,
              y0: real,
              y1: real,
              line: { color: color("quiet"), width: 1, dash: "dot" },
            })),
      annotations:
        real === undefined
          ? []
          : [
              {
                text: "real test images",
                xref: "paper",
                x: 0,
                xanchor: "left",
                yref: "y",
                y: positive ? Math.log10(real) : real,
                yanchor: "bottom",
                showarrow: false,
                font: { size: 11, color: color("quiet") },
              },
            ],
    }),
    traces.map(() => null),
  );
}

// A line for each sampler and scale; the arms of intervals end at `least`, outside of the plot.
function linesOf(points, cost, samplers, scales, least) {
  const traces = [];
  for (const sampler of samplers) {
    for (const scale of scales) {
      const line = points
        .filter((point) => point.sampler === sampler && point.scale === scale && point.note !== "pruned")
        .sort((a, b) => a[cost.key] - b[cost.key]);
      if (!line.length) continue;
      const name = plain(scales.length > 1 ? `${sampler}, scale ${show(scale)}` : sampler);
      const paint = hue(samplers.indexOf(sampler));
      const arms = line.map((point) =>
        isNumber(point.low) && isNumber(point.high)
          ? [point.high - point.value, point.value - Math.max(point.low, Math.min(least, point.value))]
          : [0, 0],
      );
      traces.push({
        type: "scatter",
        mode: "lines+markers",
        name,
        legendgroup: name,
        showlegend: cost.key === "nfe",
        xaxis: cost.x,
        yaxis: cost.y,
        x: line.map((point) => point[cost.key] * cost.unit),
        y: line.map((point) => point.value),
        error_y: {
          type: "data",
          symmetric: false,
          array: arms.map(([up]) => up),
          arrayminus: arms.map(([, down]) => down),
          color: paint,
          thickness: 1,
          width: 0,
        },
        line: { color: paint, width: 1.3, dash: DASHES[scales.indexOf(scale) % DASHES.length] },
        marker: {
          color: paint,
          symbol: SYMBOLS[scales.indexOf(scale) % SYMBOLS.length],
          size: line.map((point) => (point[cost.mark] ? 10 : 6)),
          line: { color: color("text"), width: line.map((point) => (point[cost.mark] ? 1.5 : 0)) },
        },
        text: line.map((point) =>
          plain(
            `asked: ${point.asked}, ${show(point.nfe)} NFE, ${show(1000 * point.seconds)} ms, n=${show(point.count)}`,
          ),
        ),
        hovertemplate: "<b>%{fullData.name}</b><br>%{y:.5~g}<br>%{text}<extra></extra>",
      });
    }
  }
  return traces;
}

function frontOf(points, cost) {
  const front = points.filter((point) => point[cost.mark]).sort((a, b) => a[cost.key] - b[cost.key]);
  if (front.length < 2) return [];
  return [
    {
      type: "scatter",
      mode: "lines",
      name: "Pareto front",
      legendgroup: "front",
      showlegend: cost.key === "nfe",
      xaxis: cost.x,
      yaxis: cost.y,
      hoverinfo: "skip",
      opacity: 0.25,
      x: front.map((point) => point[cost.key] * cost.unit),
      y: front.map((point) => point.value),
      line: { color: color("text"), width: 5, shape: "hv" },
    },
  ];
}
