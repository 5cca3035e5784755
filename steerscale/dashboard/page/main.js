"use strict";
// Start, and whatever changes what is looked at. The state is in the address, so that a reload or a link keeps it.

/** Draw everything that follows from `view`. */
function refresh() {
  const focused = document.activeElement?.dataset?.focus;
  let shown;
  try {
    shown = shownRuns();
    byId("filter-error").textContent = "";
    byId("filter").removeAttribute("aria-invalid");
  } catch (error) {
    byId("filter-error").textContent = error.message;
    byId("filter").setAttribute("aria-invalid", "true");
    return;
  }
  view.shown = shown;
  drawCharts(shown);
  drawTable(shown);
  drawCompare();
  drawHeat(shown);
  drawScatter(shown);
  if (focused) document.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
  keepAddress();
}

function setFilter(text) {
  view.filter = text;
  byId("filter").value = text;
  refresh();
}

function keepAddress() {
  const order = view.sort === "run" && !view.descending ? "" : `${view.descending ? "-" : ""}${view.sort}`;
  const parts = { filter: view.filter, sort: order, columns: view.columns.join(","), runs: JSON.stringify([...view.chosen]) };
  if (!view.chosen.size) delete parts.runs;
  const text = new URLSearchParams(Object.entries(parts).filter(([, value]) => value)).toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  view.filter = parts.get("filter") ?? "";
  const sort = parts.get("sort") ?? "run";
  const known = (key) => figures.has(key) || configKeys.includes(key);
  view.descending = sort.startsWith("-");
  view.sort = known(sort.replace(/^-/, "")) ? sort.replace(/^-/, "") : "run";
  view.columns = (parts.get("columns") ?? "").split(",").filter((key) => key && known(key));
  try {
    view.chosen = new Set(JSON.parse(parts.get("runs") ?? "[]"));
  } catch {
    view.chosen = new Set();
  }
}

function drawConstants() {
  const entries = (map) => map.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]);
  byId("formulas").replaceChildren(...entries(Object.entries(data.formulas)));
  byId("peaks").replaceChildren(...entries(data.peaks.map(([device, peak]) => [device, peak === null ? "unknown: no MFU, no HFU" : `${peak} TFLOP/s`])));
  byId("age").textContent = boot.data ? `as of ${data.generated}` : `live, as of ${data.generated}`;
  drawBroken();
  fillKeys(byId("key"), { extra: [["", "config key or figure…"]] });
  fillKeys(byId("column"), { extra: [["", "…"]] });
  const first = (id, fallback) => byId(id).value || fallback;
  const engines = figures.get("engine").shown;  // they differ
  fillKeys(byId("heat-x"), { value: first("heat-x", engines ? "engine" : "engine.recompute") });
  fillKeys(byId("heat-y"), { value: first("heat-y", "tp") });
  fillKeys(byId("heat-metric"), { numbers: true, value: first("heat-metric", "model_tflops_per_gpu") });
  fillKeys(byId("scatter-x"), { numbers: true, value: first("scatter-x", "gas") });
  fillKeys(byId("scatter-y"), { numbers: true, value: first("scatter-y", "tokens_per_second_per_gpu") });
  fillKeys(byId("scatter-color"), { extra: [["", "nothing"]], value: first("scatter-color", engines ? "engine" : "device") });
}

function listen() {
  let pause;
  byId("filter-form").addEventListener("submit", (event) => event.preventDefault());
  byId("filter").value = view.filter;
  byId("filter").addEventListener("input", (event) => {
    clearTimeout(pause);
    pause = setTimeout(() => setFilter(event.target.value), 120);
  });
  byId("clear").addEventListener("click", () => setFilter(""));
  byId("key").addEventListener("change", (event) => {
    const input = byId("filter");
    input.value = `${input.value.trimEnd()} ${event.target.value}=`.trimStart();
    event.target.value = "";
    input.focus();
  });
  byId("column").addEventListener("change", (event) => {
    const key = event.target.value;
    event.target.value = "";
    if (key && !columns().includes(key)) view.columns.push(key);
    refresh();
  });
  byId("select-all").addEventListener("click", () => { view.shown.forEach((run) => view.chosen.add(run.path)); refresh(); });
  byId("select-none").addEventListener("click", () => { view.chosen.clear(); refresh(); });
  byId("all-keys").addEventListener("change", drawCompare);
  for (const id of ["x", "log"]) byId(id).addEventListener("change", () => drawCharts(view.shown));
  for (const id of ["heat-x", "heat-y", "heat-metric", "heat-how"]) byId(id).addEventListener("change", () => drawHeat(view.shown));
  for (const id of ["scatter-x", "scatter-y", "scatter-color"]) byId(id).addEventListener("change", () => drawScatter(view.shown));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
}

/** Ask the server for news; it answers 304 where there is none. */
async function poll(tag) {
  try {
    const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (answer.status === 200) {
      const first = data === null;
      take(await answer.json());
      tag = answer.headers.get("ETag");
      if (first) readAddress();
      drawConstants();
      if (first) listen();
      refresh();
    } else if (answer.status !== 304) {
      throw new Error(`the server answered ${answer.status}`);
    }
    byId("age").textContent = `live, as of ${data.generated}`;
  } catch (error) {
    byId("age").textContent = `not live any more: ${error.message}`;
  }
  setTimeout(() => poll(tag), boot.refresh_s * 1000);
}

if (data) {
  take(data);
  readAddress();
  drawConstants();
  listen();
  refresh();
  document.documentElement.dataset.ready = Math.round(performance.now());
} else {
  poll(null).then(() => { document.documentElement.dataset.ready = Math.round(performance.now()); });
}
