"use strict";
// Curves of some runs, and one figure against another for all.

const MOST_DRAWN = 30, DRAWN_UNASKED = 8;
const PALETTE = ["#0b72c4", "#d9730d", "#2a9d5c", "#c2378f", "#7a5cd6", "#b0902a", "#119fb0", "#d1453b", "#6b7a89", "#7fa61c"];
const CHARTS = [
  { title: "Training and held-out loss", unit: "nats a token", lines: [["loss", "train"], ["held-out", "held-out", "dot"]], events: true },
  { title: "Tokens/s/GPU", unit: "tokens/s", lines: [["tokens_per_second_per_gpu", ""]], zero: true },
  { title: "TFLOP/s/GPU", unit: "10¹² FLOP/s", lines: [["model_tflops_per_gpu", "model"], ["legacy_tflops_per_gpu", "legacy tag", "dot"]], zero: true },
  { title: "MFU and HFU", unit: "of the bf16 peak", lines: [["mfu", "MFU"], ["hfu", "HFU", "dot"]], zero: true, percent: true, empty: "unknown: no peak is known for the devices of these runs" },
  { title: "Seconds a step", unit: "seconds", lines: [["seconds_p50", "p50"], ["seconds_p95", "p95", "dot"]], zero: true },
  { title: "Peak memory", unit: "GiB, fullest rank", lines: [["memory_peak_gib_max", "measured"], ["memory_predicted_gib", "predicted", "dot"]], zero: true },
  { title: "Pipeline bubble", unit: "of the ideal time, by formula", lines: [["bubble_fraction", ""]], zero: true, percent: true },
];
const MARKS = {
  restart: ["restart", "triangle-up", "#0b72c4"], skip: ["skipped step", "x", "#d1453b"],
  slow: ["slow step", "circle-open", "#b0902a"], straggler: ["rank waited for", "diamond", "#7a5cd6"],
};

let drawn = [];

function colorOf(run) {
  const index = drawn.indexOf(run);
  return index < 0 ? null : index < PALETTE.length ? PALETTE[index] : `hsl(${(index * 137.5) % 360} 55% 50%)`;
}

function chooseDrawn(shown) {
  const chosen = data.runs.filter((run) => view.chosen.has(run.path));
  drawn = chosen.length ? chosen.slice(0, MOST_DRAWN) : shown.slice(0, DRAWN_UNASKED);
  const more = chosen.length > MOST_DRAWN ? `the first ${MOST_DRAWN} of ${chosen.length} selected runs` : "";
  byId("drawn").textContent = more || (chosen.length ? "the selected runs" : shown.length > DRAWN_UNASKED ? `the first ${DRAWN_UNASKED} rows of the table: select others there` : "");
  byId("legend").replaceChildren(...drawn.map((run) => {
    const mark = element("span", { class: "swatch" });
    mark.style.background = colorOf(run);
    return element("li", { title: run.path }, mark, run.figures.run);
  }));
}

function layoutOf(more) {
  const style = getComputedStyle(document.documentElement);
  const [ink, line, paper] = ["--soft", "--line", "--paper"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  return {
    margin: { l: 60, r: 12, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { color: ink, size: 11, family: style.fontFamily }, hoverlabel: { bgcolor: paper, bordercolor: line, font: { color: style.getPropertyValue("--ink").trim() } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: ink, activecolor: style.getPropertyValue("--accent").trim() },
    hovermode: "closest", ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}

const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };

/** Plots are drawn when they come into view, one after the other with room for a key or a click in between. */
const waiting = new Map();  // figure -> how to draw it
const queue = new Set();    // those in view
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting && waiting.has(entry.target)) queue.add(entry.target);
  }
  if (queue.size) whenIdle(drawNext);
}, { rootMargin: "200px" });

const whenIdle = (action) => requestIdleCallback(action, { timeout: 300 });
let drawing = false;

function drawNext() {
  if (drawing) return;
  drawing = true;
  loadPlotly();
  const [figure] = queue;
  queue.delete(figure);
  const draw = waiting.get(figure);
  waiting.delete(figure);
  if (draw) draw();
  drawing = false;
  if (queue.size) whenIdle(drawNext);
}

/** plotly.js is five megabytes: it runs when the table stands and a plot comes into view. */
function loadPlotly() {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = byId("plotly").textContent;
  document.body.append(script);
}

function later(figure, draw) {
  waiting.set(figure, draw);
  watcher.unobserve(figure);
  watcher.observe(figure);
}

/** A legend of ours above it, since Plotly's own moves the plot about to make room. */
function plot(figure, caption, unit, traces, layout, empty = "nothing recorded", legend = []) {
  if (!figure.firstChild) figure.append(element("figcaption"), element("div", { class: "plot" }));
  const [head, box] = figure.children;
  head.replaceChildren(caption, " ", element("span", {}, unit), ...legend.slice(0, MOST_DRAWN).map(([label, color]) => {
    const swatch = element("i", { class: "swatch" });
    swatch.style.background = color;
    return element("span", { class: "entry" }, swatch, label);
  }));
  const some = traces.some((trace) => trace.y.some((value) => value !== null && value !== undefined));
  later(figure, () => {
    if (!some) {
      Plotly.purge(box);
      box.replaceChildren(element("div", { class: "empty" }, empty));
      return;
    }
    if (box.querySelector(".empty")) box.replaceChildren();
    Plotly.react(box, traces, layoutOf(layout), CONFIG);
  });
}

const listed = (values, length) => (Array.isArray(values) ? values : Array(length).fill(values ?? null));
const across = (points) => (byId("x").value === "time" ? points.time.map((seconds) => (seconds === null ? null : seconds / 3600)) : points.step);

function line(run, [key, label, dash]) {
  const points = key === "held-out" ? run.evaluations : run.curves;
  const x = across(points);
  const values = key === "held-out" ? points.loss : key === "memory_predicted_gib" ? run.figures[key] : points[key];
  const y = listed(values, x.length);
  return {
    type: "scatter", mode: key === "held-out" || x.length < 3 ? "lines+markers" : "lines", x, y, name: plain(`${run.figures.run}${label && ` · ${label}`}`),
    line: { color: colorOf(run), width: 1.6, dash }, marker: { size: 5 }, hovertemplate: "%{fullData.name}<br>%{x:,.6~g}: <b>%{y:.5~g}</b><extra></extra>",
  };
}

/** Plotly understands some markup in names: a run's name is text. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function drawCharts(shown) {
  chooseDrawn(shown);
  const figuresThere = byId("charts");
  while (figuresThere.children.length <= CHARTS.length) figuresThere.append(element("figure"));
  const xaxis = { title: { text: byId("x").value === "time" ? "hours since the start" : "step" }, rangemode: "tozero" };
  CHARTS.forEach((chart, index) => {
    const traces = drawn.flatMap((run) => chart.lines.map((spec) => line(run, spec)));
    if (chart.events) traces.push(...drawn.flatMap(marksOnLoss));
    const yaxis = { rangemode: chart.zero ? "tozero" : "normal", tickformat: chart.percent ? ".1~%" : undefined };
    if (chart.events && byId("log").checked) yaxis.type = "log";
    const unit = chart.unit + chart.lines.filter(([, label]) => label).map(([, label, dash]) => `; ${dash ? "dotted" : "line"}: ${label}`).join("");
    plot(figuresThere.children[index], chart.title, unit, traces, { xaxis, yaxis }, chart.empty);
  });
  drawEvents(figuresThere.children[CHARTS.length], xaxis);
}

/** Restarts and skipped steps where the loss was at the time. */
function marksOnLoss(run) {
  const events = run.events.filter((event) => event.kind === "restart" || event.kind === "skip");
  if (!events.length) return [];
  const losses = listed(run.curves.loss, run.curves.step.length);
  const lossAt = (step) => {
    let index = run.curves.step.findIndex((other) => other >= step);
    if (index < 0) index = losses.length - 1;
    while (index > 0 && (losses[index] ?? null) === null) index -= 1;
    return losses[index];
  };
  return [{
    type: "scatter", mode: "markers", name: plain(run.figures.run), x: across(spread(events)), y: events.map((event) => lossAt(event.step)),
    marker: { symbol: events.map((event) => MARKS[event.kind][1]), color: events.map((event) => MARKS[event.kind][2]), size: 7 },
    text: events.map((event) => plain(`${MARKS[event.kind][0]} at step ${event.step}: ${event.text}`)), hovertemplate: "%{fullData.name}<br>%{text}<extra></extra>",
  }];
}

const spread = (events) => ({ step: events.map((event) => event.step), time: events.map((event) => event.time) });

function drawEvents(figure, xaxis) {
  figure.className = "wide";
  const names = new Map(drawn.map((run, index) => [run, `${index + 1}`]));
  const traces = Object.entries(MARKS).map(([kind, [label, symbol, color]]) => {
    const events = drawn.flatMap((run) => run.events.filter((event) => event.kind === kind).map((event) => [run, event]));
    return {
      type: "scatter", mode: "markers", name: label, x: across(spread(events.map(([, event]) => event))), y: events.map(([run]) => names.get(run)),
      marker: { symbol, color, size: 9, line: { width: 1.5 } }, hovertemplate: "%{text}<extra></extra>",
      text: events.map(([run, event]) => plain(`${run.figures.run}, step ${event.step}: ${label}, ${event.text}`)),
    };
  });
  const yaxis = {
    type: "category", categoryarray: [...names.values()].reverse(), categoryorder: "array", range: [-0.6, drawn.length - 0.4],
    tickvals: [...names.values()], ticktext: [...names.keys()].map((run) => plain(shorten(run.figures.run, 28))),
  };
  const layout = { xaxis, yaxis, margin: { l: 190, r: 12, t: 8, b: 40 } };
  const legend = Object.values(MARKS).map(([label, , color]) => [label, color]);
  plot(figure, "Restarts, skipped and slow steps, ranks waited for", "a row a run", traces, layout, "none in these runs", legend);
  const box = figure.children[1];
  box.style.height = `${Math.max(250, 80 + 24 * drawn.length)}px`;
}

const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

function drawScatter(runs) {
  const [x, y, group] = ["scatter-x", "scatter-y", "scatter-color"].map((id) => byId(id).value);
  const groups = new Map();
  for (const run of runs) {
    const name = group ? written(group, valueOf(run, group)) : "";
    groups.set(name, [...(groups.get(name) ?? []), run]);
  }
  const names = [...groups.keys()].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const traces = names.map((name, index) => points(groups.get(name), x, y, plain(name), PALETTE[index % PALETTE.length]));
  const legend = names.length > 1 ? names.map((name, index) => [name, PALETTE[index % PALETTE.length]]) : [];
  const layout = { xaxis: axisOf(x), yaxis: axisOf(y) };
  plot(byId("scatter"), `${titleOf(y)} over ${titleOf(x)}`, "a point a run; a click selects it", traces, layout, undefined, legend);
  watchClicks(byId("scatter"));

  const [predicted, measured] = ["memory_predicted_gib", "memory_peak_gib_max"];
  const both = runs.filter((run) => run.figures[predicted] !== null && run.figures[measured] !== null);
  const most = Math.max(...both.flatMap((run) => [run.figures[predicted], run.figures[measured]]), 0);
  const diagonal = { type: "scatter", mode: "lines", x: [0, most], y: both.length ? [0, most] : [], line: { dash: "dot", width: 1, color: "#888888" }, hoverinfo: "skip" };
  plot(byId("memory"), "Memory: measured over predicted", "GiB, fullest rank; dotted: as predicted; on a CPU Python and torch are in it", [diagonal, points(both, predicted, measured, "", PALETTE[0])],
    { xaxis: { ...axisOf(predicted), rangemode: "tozero" }, yaxis: { ...axisOf(measured), rangemode: "tozero" } });
  watchClicks(byId("memory"));
}

function points(runs, x, y, name, color) {
  return {
    type: "scatter", mode: "markers", name, x: runs.map((run) => valueOf(run, x) ?? null), y: runs.map((run) => valueOf(run, y) ?? null), customdata: runs.map((run) => run.path),
    marker: { color, size: 8, opacity: 0.8, line: { width: runs.map((run) => (view.chosen.has(run.path) ? 2 : 0)), color: "#d1453b" } },
    text: runs.map((run) => plain(`${run.figures.run} · ${run.figures.layout}: ${written(y, valueOf(run, y))} at ${written(x, valueOf(run, x))}`)), hovertemplate: "%{text}<extra></extra>",
  };
}

const axisOf = (key) => ({ title: { text: plain(titleOf(key)) }, tickformat: figures.get(key)?.form.endsWith("%") ? ".1~%" : undefined });

function watchClicks(figure) {
  const box = figure.children[1];
  if (box.dataset.watched || !box.on) return;
  box.dataset.watched = "yes";
  box.on("plotly_click", (event) => {
    const run = data.runs.find((other) => other.path === event.points[0].customdata);
    if (run) choose(run, !view.chosen.has(run.path));
  });
}
