// The table of runs: sorted by a column, filtered, each row with the checkbox that shows it in the plots.

const MOST_NUMBERS = 6; // that are shown before the reader asks for more
let wanted = new Set();
let rows = new Map();

function firstColumns() {
  const names = DATA.columns.map((column) => column.name);
  const first = [
    DATA.sweep?.metric,
    ...names.filter((name) => /^(fid|fd)(_|$)/.test(name) && !name.endsWith(")")),
    ...names.filter((name) => name === "train/loss" || name === "val/x0_mse"),
    ...names.filter((name) => /^(accuracy|recall|is)_/.test(name) && !name.endsWith(")")),
    ...names.filter((name) => !name.endsWith(")")),
  ].filter((name) => COLUMNS.has(name));
  return new Set([...new Set(first)].slice(0, MOST_NUMBERS));
}

function tableColumns() {
  const fact = (name, text, write = show) => ({
    id: name,
    text,
    numeric: name !== "wandb",
    value: (i) => RUNS[i].facts[name] ?? null,
    cell: (i) => write(RUNS[i].facts[name]),
  });
  const seen = (name) => RUNS.some((run) => run.facts[name] !== undefined);
  const states = Object.keys(SIGNS);
  return [
    { id: "state", text: "state", value: (i) => states.indexOf(RUNS[i].state), cell: stateCell },
    ...DATA.varying.map((column) => ({
      id: `varying:${column.key}`,
      text: column.name,
      hint: column.key,
      numeric: column.values.every((v) => v === null || isNumber(v)),
      value: (i) => column.values[i],
      cell: (i) => make("span", { class: "cut" }, show(column.values[i])),
    })),
    ...DATA.columns.filter((column) => wanted.has(column.name)).map(numberColumn),
    fact("steps", "steps"),
    fact("seconds", "time", duration),
    ...(RUNS.some((run) => run.facts.attempts > 1) ? [fact("attempts", "attempts")] : []),
    ...(seen("wandb")
      ? [{ ...fact("wandb", "W&B id"), cell: (i) => make("span", { class: "mono" }, RUNS[i].facts.wandb ?? "–") }]
      : []),
  ];
}

function stateCell(i) {
  const odd = oddities(i);
  const { cause, facts } = RUNS[i];
  // Of a process that was killed nobody writes that it has ended
  const heard =
    RUNS[i].state === "running" && facts.written
      ? make("span", { class: "quiet" }, ` last written ${facts.written}`)
      : null;
  const oddly = odd.length ? make("span", { class: "warn" }, ` ⚠ ${odd.join(", ")}`) : null;
  return make("span", { title: cause || null }, badge(i), oddly, heard);
}

function numberColumn(column) {
  const best = bestOf(column);
  const cell = (i) => {
    if (column.values[i] === null) return "–";
    const letter = kind(column, i);
    const parts = [show(column.values[i]), letter ? make("span", { class: "kind" }, letter) : null];
    // By keyboard the records are reached through "Protocols": a stop at each number would be hundreds.
    if (!DATA.records[column.name]?.[i]) return make("span", { class: "value" }, ...parts);
    return make(
      "button",
      {
        class: "value",
        type: "button",
        tabindex: -1,
        title: "how it was measured",
        onclick: () => openRecord(column.name, i),
      },
      ...parts,
    );
  };
  return {
    id: `number:${column.name}`,
    text: column.name,
    numeric: true,
    unlike: column.unlike,
    varied: column.varied,
    hint: column.unlike || { low: "smaller is better", high: "larger is better", "": "" }[column.better],
    value: (i) => column.values[i],
    group: (i) => kind(column, i),
    classes: (i) => `${kind(column, i) ? "apart" : ""} ${best.has(i) ? "best" : ""}`,
    cell,
  };
}

// The best runs among those that may be compared, unless all are as good.
function bestOf(column) {
  const found = new Set();
  if (!column.better) return found;
  const groups = grouped(
    ALL.filter((i) => isNumber(column.values[i])),
    (i) => kind(column, i),
  );
  for (const runs of groups.values()) {
    const end = Math[column.better === "low" ? "min" : "max"](...runs.map((i) => column.values[i]));
    const first = runs.filter((i) => column.values[i] === end);
    if (first.length < runs.length) first.forEach((i) => found.add(i));
  }
  return found;
}

function compareRuns(column, down) {
  const sign = down ? -1 : 1;
  return (a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a - b; // what is missing comes last
    const [p, q] = column.group ? [column.group(a), column.group(b)] : ["", ""];
    if (p !== q) return p < q ? -1 : 1; // numbers of unlike protocols are not sorted into one another
    if (isNumber(x) !== isNumber(y)) return isNumber(x) ? -1 : 1;
    const less = isNumber(x) ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return sign * less || a - b;
  };
}

function sortRows() {
  const column = tableColumns().find((one) => one.id === S.sort.by);
  order = column ? ALL.slice().sort(compareRuns(column, S.sort.down)) : ALL.slice();
}

function buildTable() {
  const columns = tableColumns();
  const heads = columns.map((column) => {
    const sorted = S.sort.by === column.id ? (S.sort.down ? "descending" : "ascending") : null;
    const name = make(
      "button",
      { type: "button", title: column.hint || null, onclick: () => sortBy(column.id) },
      column.text,
    );
    return make(
      "th",
      { scope: "col", class: column.numeric ? "number" : null, "aria-sort": sorted, "data-column": column.id },
      column.unlike ? make("span", { class: "warn" }, "≠ ") : null,
      name,
    );
  });
  const head = make("thead", {}, make("tr", {}, make("th", { scope: "col", class: "pin" }, "run"), ...heads));
  const body = make("tbody");
  rows = new Map(ALL.map((i) => [i, row(i, columns)]));
  body.append(...order.map((i) => rows.get(i)));
  byId("table").replaceChildren(head, body);
  const apart = columns.filter((column) => column.unlike);
  const varied = grouped(
    columns.filter((column) => column.varied?.length),
    (column) => column.varied.join(", "),
  );
  const reasons = grouped(apart, (column) => column.unlike.slice(column.text.length));
  byId("unlike").replaceChildren(
    ...[...reasons].map(([reason, some]) =>
      make("li", {}, `≠ ${some.map((column) => column.text).join(", ")}${reason}.`),
    ),
    ...(apart.length ? [make("li", {}, "Only numbers with the same letter may be compared.")] : []),
    ...[...varied].map(([keys, some]) =>
      make(
        "li",
        { class: "quiet" },
        `${some.map((column) => column.text).join(", ")}: measured in unlike ways on purpose, as overrides vary ${keys}.`,
      ),
    ),
  );
  showRows();
}

function row(i, columns) {
  const run = RUNS[i];
  const box = make("input", { type: "checkbox", onchange: (event) => toggle(i, event.target.checked) });
  box.checked = S.on[i];
  const swatch = make("span", { class: "swatch" });
  const name =
    DATA.varying.length && run.number !== null ? String(run.number) : DATA.varying.length ? folderName(run) : run.name;
  const cells = columns.map((column) =>
    make(
      "td",
      { class: `${column.numeric ? "number" : ""} ${column.classes?.(i) ?? ""}`.trim() || null },
      column.cell(i),
    ),
  );
  const tone = run.state === "failed" ? "failed" : oddities(i).length ? "odd" : "";
  const first = make(
    "th",
    { scope: "row", class: "pin" },
    make("label", { title: run.folder }, box, swatch, make("span", {}, name)),
  );
  return make("tr", { "data-run": i, class: tone || null, ...pointsAt(i) }, first, ...cells);
}

function folderName(run) {
  return run.folder.replace(/\/+$/, "").split("/").pop();
}

function showRows() {
  for (const [i, one] of rows) {
    one.hidden = !passing[i];
    one.classList.toggle("off", !S.on[i]);
    one.querySelector("input").checked = S.on[i];
    const swatch = one.querySelector(".swatch");
    swatch.style.borderColor = colours.of(i);
    swatch.style.borderTopStyle = { solid: "solid", dash: "dashed", dot: "dotted", dashdot: "dashed" }[colours.dash(i)];
  }
  const count = listed().length;
  byId("count").textContent =
    `${shown().length} of ${RUNS.length} in the plots${count < RUNS.length ? `, ${count} listed` : ""}`;
}

function sortBy(id) {
  S.sort =
    S.sort.by !== id ? { by: id, down: false } : S.sort.down ? { by: null, down: false } : { by: id, down: true };
  sortRows();
  buildTable();
  byId("table")
    .querySelector(`th[data-column="${CSS.escape(id)}"] button`)
    ?.focus({ preventScroll: true });
  paintLegend();
  redraw("curves", "samples");
}

function toggle(i, on) {
  S.on[i] = on;
  selectionChanged();
}

function only(i) {
  const alone = shown().length === 1 && S.on[i];
  S.on = S.on.map((_, k) => alone || k === i);
  selectionChanged();
}

function selectionChanged() {
  showRows();
  paintLegend();
  redraw("curves", "samples", "parallel");
}

function startTable() {
  wanted = firstColumns();
  const boxes = DATA.columns.map((column) => {
    const box = make("input", {
      type: "checkbox",
      onchange: () => {
        wanted[box.checked ? "add" : "delete"](column.name);
        buildTable();
      },
    });
    box.checked = wanted.has(column.name);
    return make("label", {}, box, column.name);
  });
  byId("choices").append(...boxes);
  byId("columns").hidden = !boxes.length;
  const states = [...new Set(RUNS.map((run) => run.state))];
  byId("states").append(
    ...states.map((state) => {
      const count = RUNS.filter((run) => run.state === state).length;
      return make(
        "button",
        {
          type: "button",
          "aria-pressed": "true",
          "data-state": state,
          onclick: (event) => {
            const on = !S.states.has(state);
            S.states[on ? "add" : "delete"](state);
            event.currentTarget.setAttribute("aria-pressed", String(on));
            filterChanged();
          },
        },
        `${SIGNS[state]} ${state} ${count}`,
      );
    }),
  );
  byId("filter").addEventListener("input", (event) => {
    S.words = event.target.value;
    filterChanged();
  });
  for (const [id, on] of [
    ["all", true],
    ["none", false],
  ]) {
    byId(id).addEventListener("click", () => {
      listed().forEach((i) => {
        S.on[i] = on;
      });
      selectionChanged();
    });
  }
  buildTable();
}

function filterChanged() {
  refilter();
  selectionChanged();
}
