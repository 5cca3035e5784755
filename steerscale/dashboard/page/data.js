"use strict";
// The runs, and what is looked at: `view` is the state of the page, everything drawn follows from it.

const boot = JSON.parse(document.getElementById("data").textContent);
let data = boot.data;
let figures = new Map();          // key -> figure
let configKeys = [];              // dotted keys of all configurations, those that differ first
let varying = new Set();
const view = { filter: "", sort: "run", descending: false, columns: [], chosen: new Set() };

function take(fresh) {
  data = fresh;
  figures = new Map(data.figures.map((figure) => [figure.key, figure]));
  varying = new Set(data.runs.flatMap((run) => Object.keys(run.config)));
  configKeys = [...[...varying].sort(), ...Object.keys(data.common).sort()];
  data.runs.forEach((run) => {
    run.text = [run.figures.run, run.path, run.figures.layout, run.figures.engine, run.figures.state, run.figures.device].join(" ").toLowerCase();
  });
}

/** The value of a figure or a configuration key; undefined where a run has no such key. */
function valueOf(run, key) {
  if (figures.has(key)) return run.figures[key];
  if (Object.hasOwn(run.config, key)) return run.config[key];
  return Object.hasOwn(data.common, key) ? data.common[key] : undefined;
}

const titleOf = (key) => (figures.has(key) ? figures.get(key).title : key);
const betterOf = (key) => (figures.has(key) ? figures.get(key).better : "");

const formatters = new Map();

/** Write a value for people, as `figures.write` does; Python's format strings, the few that figures use. */
function written(key, value) {
  if (value === null || value === undefined) return figures.has(key) ? "unknown" : value === null ? "null" : "–";
  const form = figures.has(key) ? figures.get(key).form : "";
  if (typeof value !== "number") return typeof value === "object" ? JSON.stringify(value) : String(value);
  if (form === "s") return value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(2)} s`;
  const match = /^(,?)(?:\.(\d))?([dfg%])$/.exec(form);
  if (!match) return String(value);
  const digits = Number(match[2] ?? 0);
  if (match[3] === "%") return `${(value * 100).toFixed(digits)}%`;
  if (match[3] === "g") return String(Number(value.toPrecision(digits)));
  if (!formatters.has(form)) {
    formatters.set(form, new Intl.NumberFormat("en-US", { useGrouping: match[1] === ",", minimumFractionDigits: digits, maximumFractionDigits: digits }));
  }
  return formatters.get(form).format(value);
}

/** The terms of a filter: separated by blanks that are not in quotes. */
const filterTerms = (text) => text.match(/(?:[^\s"]|"[^"]*")+/g) ?? [];

/** Parse a filter into tests; throws an Error that says which term is wrong and what would be right. */
function parseFilter(text) {
  return filterTerms(text).map((term) => {
    const match = /^([\w.\-]+)(!=|>=|<=|=|>|<|~)(.*)$/.exec(term);
    if (!match) {
      const wanted = unquoted(term).toLowerCase();
      return (run) => run.text.includes(wanted);
    }
    const [, name, operator, raw] = match;
    const key = resolveKey(name);
    return (run) => compare(valueOf(run, key), operator, unquoted(raw));
  });
}

const unquoted = (text) => text.replace(/"/g, "");

function resolveKey(name) {
  const keys = [...figures.keys(), ...configKeys];
  if (keys.includes(name)) return name;
  const ends = configKeys.filter((key) => key.endsWith(`.${name}`));
  if (ends.length === 1) return ends[0];
  if (ends.length > 1) throw new Error(`“${name}” is the end of several keys: ${ends.join(", ")}`);
  const last = name.split(".").pop().toLowerCase();
  const near = keys.filter((key) => key.toLowerCase().includes(last) || sharesStart(key.split(".").pop().toLowerCase(), last));
  throw new Error(`unknown key “${name}”` + (near.length ? `: did you mean ${near.slice(0, 4).join(", ")}?` : ""));
}

const sharesStart = (one, other) => one.slice(0, 4) === other.slice(0, 4);

function compare(value, operator, wanted) {
  if (value === undefined) return operator === "!=";
  // Without quotes on either side: in a term they hold blanks together, and a list is written with them.
  const text = unquoted(value === null ? "null" : typeof value === "object" ? JSON.stringify(value) : String(value));
  if (operator === "~") return text.toLowerCase().includes(wanted.toLowerCase());
  const number = wanted.endsWith("%") ? Number(wanted.slice(0, -1)) / 100 : Number(wanted);
  const numeric = typeof value === "number" && wanted !== "" && !Number.isNaN(number);
  if (operator === "=" || operator === "!=") {
    const same = numeric ? value === number : text.toLowerCase() === wanted.toLowerCase();
    return same === (operator === "=");
  }
  if (value === null || (typeof value === "number" && !numeric)) return false;
  const order = numeric ? value - number : text.localeCompare(wanted);
  return { "<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0 }[operator];
}

/** Runs that pass the filter, in the order of the table; unknown values last, whichever way it is sorted. */
function shownRuns() {
  const tests = parseFilter(view.filter);
  const runs = data.runs.filter((run) => tests.every((test) => test(run)));
  const sign = view.descending ? -1 : 1;
  return runs.sort((a, b) => {
    const [one, other] = [valueOf(a, view.sort) ?? null, valueOf(b, view.sort) ?? null];
    if (one === null || other === null) return (one === null) - (other === null);
    if (typeof one === "number" && typeof other === "number") return sign * (one - other);
    return sign * String(one).localeCompare(String(other), "en", { numeric: true });
  });
}

/** Make an element; text is always text. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

const byId = (id) => document.getElementById(id);

/** Fill a select with keys, figures first; `extra` comes before them. */
function fillKeys(select, { numbers = false, extra = [], value } = {}) {
  const wanted = value ?? select.value;
  const isNumber = (key) => data.runs.some((run) => typeof valueOf(run, key) === "number");
  const group = (label, keys) => element("optgroup", { label }, ...keys.map((key) => element("option", { value: key }, titleOf(key))));
  const pass = (keys) => (numbers ? keys.filter(isNumber) : keys);
  select.replaceChildren(
    ...extra.map(([key, label]) => element("option", { value: key }, label)),
    group("figures", pass([...figures.keys()])),
    group("configuration, differs", pass(configKeys.filter((key) => varying.has(key)))),
    ...(numbers ? [] : [group("configuration, the same in all", configKeys.filter((key) => !varying.has(key)))]),
  );
  select.value = wanted;
}
