// The configs of any two runs side by side, and what went wrong in which run.

function configOf(i) {
  return new Map([...Object.entries(DATA.common), ...Object.entries(RUNS[i].config)]);
}

function startDifferences() {
  if (RUNS.length < 2) {
    byId("first").closest("label").hidden = true;
    byId("second").closest("label").hidden = true;
    byId("everything").checked = true;
    byId("everything").closest("label").hidden = true;
    byId("differences").querySelector("h2").textContent = "Config";
  }
  fill(byId("first"), runPairs(), 0);
  fill(byId("second"), runPairs(), Math.min(1, RUNS.length - 1));
  for (const id of ["first", "second", "everything"]) byId(id).addEventListener("change", paintDifferences);
  paintDifferences();
}

function paintDifferences() {
  const pair = ["first", "second"].map((id) => Number(byId(id).value));
  const configs = pair.map(configOf);
  const keys = [...new Set(configs.flatMap((config) => [...config.keys()]))].sort();
  const said = (config, key) => (config.has(key) ? JSON.stringify(config.get(key)) : undefined);
  const differing = new Set(keys.filter((key) => said(configs[0], key) !== said(configs[1], key)));
  const listedKeys = byId("everything").checked ? keys : keys.filter((key) => differing.has(key));
  const one = RUNS.length < 2;
  byId("same").textContent = one
    ? RUNS[0].overrides.join(" ")
    : `${differing.size} of ${keys.length} keys differ; the versions of packages are keys as well.`;
  const cell = (config, key) =>
    make("td", { class: "mono" }, !config.has(key) ? "–" : config.get(key) === null ? "null" : String(config.get(key)));
  const heads = ["key", ...pair.slice(0, one ? 1 : 2).map(title)];
  const lines = listedKeys.map((key) =>
    make(
      "tr",
      { class: differing.has(key) && byId("everything").checked ? "differs" : null },
      make("td", { class: "mono" }, key),
      ...configs.slice(0, one ? 1 : 2).map((config) => cell(config, key)),
    ),
  );
  byId("keys").replaceChildren(
    ...(lines.length
      ? [make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", {}, head)))), make("tbody", {}, ...lines)]
      : []),
  );
}

// Failed runs with the first cause and the log; runs of one cause together.
function startCauses() {
  const bad = ALL.filter((i) => RUNS[i].state === "failed");
  byId("attention").hidden = !bad.length;
  const groups = grouped(bad, (i) => RUNS[i].cause || "no cause was written");
  byId("causes").append(
    ...[...groups].map(([cause, runs]) => {
      const places = runs.map((i) =>
        make("li", { class: "quiet" }, `${title(i)}: `, make("span", { class: "mono" }, RUNS[i].log || RUNS[i].folder)),
      );
      const where = make("div", { class: "mono quiet" }, RUNS[runs[0]].log || RUNS[runs[0]].folder);
      const alone = runs.length === 1;
      return make(
        "li",
        {},
        make("b", { class: "bad" }, alone ? title(runs[0]) : `${runs.length} runs`),
        ` failed: ${cause}`,
        alone ? where : make("ul", {}, ...places),
      );
    }),
  );
}
