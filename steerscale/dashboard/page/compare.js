"use strict";
// Selected runs beside each other: figures with their change against the first, then what differs in their configurations.

const MOST_COMPARED = 12;

function drawCompare() {
  const runs = data.runs.filter((run) => view.chosen.has(run.path)).slice(0, MOST_COMPARED);
  byId("compare-section").hidden = runs.length === 0;
  if (!runs.length) return;
  const dropped = view.chosen.size - runs.length;
  byId("compare-title").textContent = `Comparison of ${runs.length} run${runs.length > 1 ? "s" : ""}${dropped > 0 ? ` (${dropped} more selected)` : ""}`;
  const head = element("tr", {}, element("th", { class: "text" }, runs.length > 1 ? "against the first" : ""), ...runs.map((run) => {
    const mark = element("span", { class: "swatch" });
    mark.style.background = colorOf(run) ?? "transparent";
    return element("th", { scope: "col", title: run.path }, mark, run.figures.run);
  }));
  const all = byId("all-keys").checked || runs.length === 1;
  const lines = [groupLine("Figures", runs.length), ...data.figures.filter((figure) => figure.key !== "run").map((figure) => figureLine(figure.key, runs, all))];
  const keys = [...new Set([...configKeys])].filter((key) => all || differs(key, runs));
  lines.push(groupLine(all ? "Configuration" : `Configuration: ${keys.length} of ${configKeys.length} keys differ`, runs.length));
  lines.push(...keys.map((key) => {
    const line = element("tr", { class: runs.length > 1 && differs(key, runs) ? "differs" : "", "data-key": key }, element("th", { scope: "row" }, key));
    line.append(...runs.map((run) => element("td", {}, written(key, valueOf(run, key)))));
    return line;
  }));
  byId("compare").replaceChildren(element("thead", {}, head), element("tbody", {}, ...lines.filter(Boolean)));
}

const groupLine = (title, count) => element("tr", { class: "group" }, element("th", { colspan: count + 1 }, title));
const differs = (key, runs) => new Set(runs.map((run) => JSON.stringify(valueOf(run, key)))).size > 1;

function figureLine(key, runs, all) {
  if (!all && !differs(key, runs) && !figures.get(key).shown) return null;
  const values = runs.map((run) => valueOf(run, key));
  const numbers = values.filter((value) => typeof value === "number");
  const better = betterOf(key);
  const best = better && numbers.length > 1 && new Set(numbers).size > 1 ? Math[better === "high" ? "max" : "min"](...numbers) : null;
  const cells = values.map((value, index) => {
    const node = element("td", { class: value === best && best !== null ? "best" : value === null ? "unknown" : "" }, written(key, value));
    if (index && better && typeof value === "number" && typeof values[0] === "number" && values[0] !== 0 && value !== values[0]) {
      const change = (value / values[0] - 1) * 100;
      node.append(element("span", { class: "change" }, `${change > 0 ? "+" : "−"}${Math.abs(change).toFixed(Math.abs(change) < 10 ? 1 : 0)}%`));
    }
    return node;
  });
  return element("tr", { "data-key": key }, element("th", { scope: "row", title: figures.get(key).note }, titleOf(key)), ...cells);
}
