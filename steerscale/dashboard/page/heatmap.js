"use strict";
// Layouts against each other: a table of buttons, so that it can be read and used without a mouse.

const SCALE = { light: [[240, 246, 252], [11, 99, 176]], dark: [[28, 38, 48], [84, 160, 226]] };

const AXES = [["mbs", "gas"], ["tp", "pp"]];

function drawHeat(runs) {
  const metric = byId("heat-metric").value;
  const own = [byId("heat-x").value, byId("heat-y").value];
  byId("heat").replaceChildren(...[...AXES, own].map(([x, y]) => heatMap(runs, x, y, metric)));
}

function heatMap(runs, x, y, metric) {
  const there = runs.filter((run) => [x, y].every((key) => (valueOf(run, key) ?? null) !== null));
  const [columnsThere, rowsThere] = [distinct(there, x), distinct(there, y)];
  const cells = new Map();
  for (const run of there) {
    const name = JSON.stringify([valueOf(run, x), valueOf(run, y)]);
    cells.set(name, [...(cells.get(name) ?? []), run]);
  }
  const values = new Map([...cells].map(([name, inside]) => [name, summary(inside, metric)]));
  const known = [...values.values()].filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];

  const head = element("tr", {}, element("th", {}, `${titleOf(y)} ↓  ${titleOf(x)} →`), ...columnsThere.map((value) => element("th", { scope: "col" }, written(x, value))));
  const lines = rowsThere.map((down) => element("tr", {}, element("th", { scope: "row" }, written(y, down)), ...columnsThere.map((right) => {
    const inside = cells.get(JSON.stringify([right, down]));
    if (!inside) return element("td", { class: "none", title: "no run" }, "·");
    const value = values.get(JSON.stringify([right, down]));
    return element("td", {}, cell(x, y, right, down, inside, metric, value, value === null ? null : high > low ? (value - low) / (high - low) : 1));
  })));
  const caption = element("caption", {}, `${titleOf(x)} × ${titleOf(y)}: `, element("span", {}, `${byId("heat-how").value} ${titleOf(metric)}`));
  return element("table", { class: "heat", "data-axes": `${x} ${y}` }, caption, element("thead", {}, head), element("tbody", {}, ...lines));
}

const distinct = (runs, key) => [...new Set(runs.map((run) => valueOf(run, key)))].sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true })));

/** Best, median or worst value of a cell's runs; where neither direction is better, best is the highest. */
function summary(runs, metric) {
  const values = runs.map((run) => valueOf(run, metric)).filter((value) => typeof value === "number").sort((a, b) => a - b);
  if (!values.length) return null;
  const how = byId("heat-how").value;
  if (how === "median") return (values[(values.length - 1) >> 1] + values[values.length >> 1]) / 2;
  return (how === "best") === (betterOf(metric) === "low") ? values[0] : values[values.length - 1];
}

function cell(x, y, right, down, runs, metric, value, share) {
  const terms = [term(x, right), term(y, down)];
  const on = terms.every((one) => filterTerms(view.filter).includes(one));
  const button = element("button", {
    type: "button", "aria-pressed": String(on), "data-focus": `heat ${terms.join(" ")}`, onclick: () => toggleTerms(terms, on),
    title: `${terms.join(", ")}: ${runs.length} run${runs.length > 1 ? "s" : ""}`,
  }, written(metric, value), element("small", {}, runs.length > 1 ? `${runs.length} runs` : "1 run"));
  if (share !== null) {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const [from, to] = SCALE[dark ? "dark" : "light"];
    const color = from.map((one, index) => Math.round(one + (to[index] - one) * share));
    button.style.background = `rgb(${color})`;
    // Whichever ink is easier to read on it (relative luminance, roughly).
    button.style.color = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140 ? "#10161c" : "#ffffff";
  }
  return button;
}

const term = (key, value) => `${key}=${/[\s"]/.test(String(value)) ? `"${unquoted(String(value))}"` : value}`;

function toggleTerms(terms, on) {
  const keys = terms.map((one) => `${one.split("=")[0]}=`);
  const others = filterTerms(view.filter).filter((one) => !keys.some((key) => one.startsWith(key)));
  setFilter([...others, ...(on ? [] : terms)].join(" "));
}
