// Plotly with the colours of the page, and one run standing out wherever it is drawn.

// The buttons by name: the usual ones include one that would send the chart to a server.
const BUTTONS = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"], ["toImage"]];
const CONFIG = {
  displaylogo: false,
  responsive: true,
  modeBarButtons: BUTTONS,
  plotlyServerURL: "",
  showSendToCloud: false,
  showTips: false,
};

function axis(more = {}) {
  return {
    gridcolor: color("grid"),
    zerolinecolor: color("line"),
    linecolor: color("line"),
    automargin: true,
    ...more,
  };
}

function layout(more = {}) {
  return {
    paper_bgcolor: color("card"),
    plot_bgcolor: color("card"),
    font: { color: color("text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    margin: { l: 60, r: 16, t: 26, b: 44 },
    hovermode: "closest",
    hoverlabel: {
      bgcolor: color("card"),
      bordercolor: color("line"),
      font: { color: color("text") },
      align: "left",
      namelength: -1,
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("quiet"), activecolor: color("accent") },
    showlegend: false,
    ...more,
  };
}

// What stands in a plot that has nothing to show.
function remark(text) {
  return { text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
}

// Draw; `runs` says which run each trace is of, null for none.
function plot(id, traces, how, runs) {
  const place = byId(id);
  place.runs = runs;
  Plotly.react(place, traces, how, CONFIG);
  if (!place.listens) {
    place.listens = true;
    place.on("plotly_hover", (event) => emphasise(place.runs[event.points[0].curveNumber]));
    place.on("plotly_unhover", () => emphasise(null));
  }
}

// Let one run stand out in the table, the legend, the pictures and the plots; null: none.
function emphasise(i) {
  for (const one of document.querySelectorAll("[data-run].strong")) one.classList.remove("strong");
  if (i !== null && i !== undefined) {
    for (const one of document.querySelectorAll(`[data-run="${i}"]`)) one.classList.add("strong");
  }
  for (const id of ["curve", "axes"]) {
    const place = byId(id);
    if (!place.runs) continue;
    let found = false;
    for (const line of place.querySelectorAll(".scatterlayer .trace")) {
      const trace = line.__data__?.[0]?.trace; // as Plotly binds it
      const same = i !== null && i !== undefined && trace && place.runs[trace.index] === i;
      line.classList.toggle("strong", Boolean(same));
      found ||= same;
    }
    place.classList.toggle("dimmed", Boolean(found));
  }
}

function pointsAt(i) {
  return {
    onmouseenter: () => emphasise(i),
    onmouseleave: () => emphasise(null),
    onfocusin: () => emphasise(i),
    onfocusout: () => emphasise(null),
  };
}
