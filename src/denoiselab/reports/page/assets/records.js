// Protocols: each distinct one once, the records of a run, and one number with everything that is known of it.

function startRecords() {
  const names = Object.keys(DATA.protocols);
  byId("protocols").hidden = !names.length;
  if (!names.length) return;
  const uses = new Map(names.map((name) => [name, { numbers: new Set(), runs: new Set() }]));
  for (const [column, some] of Object.entries(DATA.records)) {
    some.forEach((record, i) => {
      if (!record) return;
      uses.get(record.protocol).numbers.add(column);
      uses.get(record.protocol).runs.add(i);
    });
  }
  byId("kinds").append(
    ...names.map((name) => {
      const { numbers, runs } = uses.get(name);
      const many = runs.size === RUNS.length ? "all runs" : runs.size === 1 ? title([...runs][0]) : `${runs.size} runs`;
      const full = make("pre");
      const open = make(
        "details",
        {},
        make(
          "summary",
          {},
          make("span", { class: "mono" }, name),
          " ",
          make("b", {}, [...numbers].join(", ")),
          make("span", { class: "quiet" }, ` · ${many} · ${DATA.protocols[name].line}`),
        ),
        full,
      );
      open.addEventListener("toggle", () => {
        full.textContent = JSON.stringify(DATA.protocols[name].record, null, 2);
      });
      return open;
    }),
  );
  const owners = runPairs().filter(([i]) => Object.values(DATA.records).some((some) => some[i]));
  fill(byId("owner"), owners, owners[0][0]);
  byId("owner").addEventListener("change", paintNumbers);
  byId("close").addEventListener("click", () => byId("record").close());
  paintNumbers();
}

function paintNumbers() {
  const i = Number(byId("owner").value);
  const heads = ["number", "value", "95 % interval", "real test images", "step", "protocol"];
  const lines = Object.entries(DATA.records)
    .filter(([, some]) => some[i])
    .map(([column, some]) => {
      const { value, interval, floor, own, protocol } = some[i];
      const name = make("button", { type: "button", class: "value", onclick: () => openRecord(column, i) }, column);
      const cells = [
        name,
        show(value),
        interval ? `${show(interval[0])} – ${show(interval[1])}` : "–",
        show(floor),
        show(own.step),
        make("span", { class: "mono" }, protocol),
      ];
      return make("tr", {}, ...cells.map((cell, k) => make("td", { class: k > 0 && k < 5 ? "number" : null }, cell)));
    });
  byId("numbers").replaceChildren(
    make(
      "thead",
      {},
      make("tr", {}, ...heads.map((head, k) => make("th", { class: k > 0 && k < 5 ? "number" : null }, head))),
    ),
    make("tbody", {}, ...lines),
  );
}

function openRecord(column, i) {
  const { protocol, own, value, interval, floor } = DATA.records[column][i];
  byId("recorded").textContent = `${column} = ${show(value)}`;
  const unlike = COLUMNS.get(column)?.unlike;
  byId("measured").textContent = `${title(i)} · ${DATA.protocols[protocol].line}${unlike ? ` · ≠ ${unlike}` : ""}`;
  byId("plain").textContent = JSON.stringify(
    {
      name: column,
      value,
      interval,
      floor,
      protocol_id: protocol,
      protocol: { ...DATA.protocols[protocol].record, ...own },
    },
    null,
    2,
  );
  byId("record").showModal();
}
