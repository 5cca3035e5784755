"use strict";
// The table of runs: sorting, selection, columns.

const columns = () => [...data.figures.filter((figure) => figure.shown).map((figure) => figure.key), ...view.columns];
const isText = (key) => (figures.has(key) ? figures.get(key).form === "" : !data.runs.some((run) => typeof valueOf(run, key) === "number"));

const rows = { data: null, keys: "", nodes: new Map() };  // made once: a row that is only selected stays where it is, and keeps the focus

function drawTable(runs) {
  drawHead();
  const keys = columns();
  if (rows.data !== data || rows.keys !== keys.join()) Object.assign(rows, { data, keys: keys.join(), nodes: new Map() });
  const texts = keys.map(isText);
  const nodes = runs.map((run) => {
    if (!rows.nodes.has(run)) rows.nodes.set(run, row(run, keys, texts));
    return mark(run, rows.nodes.get(run));
  });
  const body = byId("runs").tBodies[0];
  if (nodes.length !== body.rows.length || nodes.some((node, index) => node !== body.rows[index])) body.replaceChildren(...nodes);
  const unfinished = data.broken.length ? `, ${data.broken.length} not readable` : "";
  byId("summary").textContent = `${runs.length} of ${data.runs.length} runs${view.chosen.size ? `, ${view.chosen.size} selected` : ""}${unfinished}`;
}

function drawHead() {
  const head = element("tr", {}, element("th", { class: "text" }, element("span", { class: "swatch" })));
  for (const key of columns()) {
    const sorted = view.sort === key;
    const arrow = sorted ? (view.descending ? " ↓" : " ↑") : "";
    const button = element("button", { type: "button", "data-focus": `sort ${key}`, title: figures.has(key) ? figures.get(key).note : key, onclick: () => sortBy(key) }, titleOf(key) + arrow);
    const cell = element("th", { scope: "col", class: isText(key) ? "text" : "", "aria-sort": sorted ? (view.descending ? "descending" : "ascending") : "none" }, button);
    if (view.columns.includes(key)) {
      cell.append(element("button", { type: "button", class: "drop", "aria-label": `remove column ${key}`, onclick: () => dropColumn(key) }, "×"));
    }
    head.append(cell);
  }
  byId("runs").tHead.replaceChildren(head);
}

function row(run, keys, texts) {
  const box = element("input", { type: "checkbox", "aria-label": `select ${run.figures.run}`, "data-focus": `run ${run.path}`, onchange: (event) => choose(run, event.target.checked) });
  const cells = keys.map((key, index) => {
    const value = valueOf(run, key);
    const unknown = value === null || value === undefined;
    const kind = [texts[index] ? "text" : "", unknown ? "unknown" : "", key === "state" ? `state-${value}` : ""].join(" ").trim();
    const title = key === "run" ? run.path : key === "state" && run.reason ? run.reason : unknown ? whyUnknown(run, key) : undefined;
    return element("td", { class: kind, title }, written(key, value));
  });
  return element("tr", {}, element("td", { class: "text" }, element("span", { class: "swatch", "aria-hidden": "true" }), box), ...cells);
}

/** Show whether a run is selected, and in which colour it is drawn. */
function mark(run, node) {
  const chosen = view.chosen.has(run.path);
  node.className = chosen ? "chosen" : "";
  node.querySelector("input").checked = chosen;
  node.querySelector(".swatch").style.background = colorOf(run) ?? "transparent";
  return node;
}

function whyUnknown(run, key) {
  if (["mfu", "hfu", "peak_tflops"].includes(key)) return `no dense bf16 peak is known for ${run.figures.device}, or the run is not bf16: metrics.peak_tflops sets one`;
  return figures.has(key) ? "not recorded" : "no such key in this run's configuration";
}

function sortBy(key) {
  view.descending = view.sort === key ? !view.descending : betterOf(key) === "high";
  view.sort = key;
  refresh();
}

function choose(run, chosen) {
  if (chosen) view.chosen.add(run.path);
  else view.chosen.delete(run.path);
  refresh();
}

function dropColumn(key) {
  view.columns = view.columns.filter((other) => other !== key);
  if (view.sort === key) view.sort = "run";
  refresh();
}

function drawBroken() {
  const list = data.broken.map((entry) => element("li", {}, `${entry.path}: ${entry.reason}`));
  byId("broken").replaceChildren(...(list.length ? [element("strong", {}, "Not read"), element("ul", {}, ...list)] : []));
}
