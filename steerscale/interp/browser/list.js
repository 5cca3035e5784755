"use strict";
// The list: only rows that are in view stand in the document, however many latents there are.

const ROW = 26, MORE = 10;
const HEADS = [["number", "latent"], ["density", "density"], ["max", "largest"], ["effect", "effect"]];

function drawHeads() {
  const arrow = view.descending ? " ↓" : " ↑";
  byId("heads").replaceChildren(...HEADS.map(([key, title]) => {
    const button = element("button", { type: "button", "data-sort": key, title: SORTS[key][0] }, title + (view.sort === key ? arrow : ""));
    button.addEventListener("click", () => sortBy(key));
    return element("span", {}, button);
  }), element("span", {}, "strongest at"));
}

function drawList() {
  const list = byId("list"), spacer = byId("spacer");
  spacer.style.height = `${view.listed.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - MORE);
  const last = Math.min(view.listed.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + MORE);
  spacer.replaceChildren(...view.listed.slice(first, last).map((latent, index) => rowOf(latent, first + index)));
  list.setAttribute("aria-activedescendant", view.latent === null ? "" : `row-${view.latent}`);
}

function rowOf(latent, index) {
  const token = peakToken(latent), dead = isDead(latent);
  const row = element("div", { class: dead ? "row dead" : "row", id: `row-${latent}`, role: "option", "aria-selected": String(latent === view.latent), "aria-posinset": index + 1, "aria-setsize": view.listed.length, "data-latent": latent },
    element("span", {}, String(latent)), element("span", {}, dead ? "dead" : percent(densityOf(latent))),
    element("span", {}, dead ? "–" : short(arrays.largest[latent])), element("span", {}, C ? short(effectOf(latent)) : "–"),
    element("span", {}, token === null ? "" : shown(token, { blanks: true })));
  row.style.top = `${index * ROW}px`;
  return row;
}

/** Bring the chosen latent into view. */
function reveal() {
  const list = byId("list"), index = view.listed.indexOf(view.latent);
  if (index < 0) return;
  if (index * ROW < list.scrollTop || (index + 1) * ROW > list.scrollTop + list.clientHeight) {
    list.scrollTop = Math.max(0, index * ROW - list.clientHeight / 2);
  }
}

const KEYS = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -Infinity, End: Infinity };

function watchList() {
  const list = byId("list");
  let asked = false;
  list.addEventListener("scroll", () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; drawList(); });
  });
  new ResizeObserver(drawList).observe(list);
  list.addEventListener("click", (event) => {
    const row = event.target.closest("[data-latent]");
    if (row) choose(Number(row.dataset.latent));
  });
  list.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS) || !view.listed.length) return;
    event.preventDefault();
    const index = view.listed.indexOf(view.latent) + KEYS[event.key];
    choose(view.listed[Math.min(Math.max(index, 0), view.listed.length - 1)]);
  });
}

/** How often latents are active: a bar a quarter of a power of ten. */
function drawDensities() {
  const STEPS = 4, lowest = Math.floor(Math.log10(1 / meta.num_tokens));
  const values = Array(-lowest * STEPS).fill(0);
  const place = (latent) => Math.min(Math.max(Math.floor((Math.log10(densityOf(latent)) - lowest) * STEPS), 0), values.length - 1);
  let dead = 0;
  for (let latent = 0; latent < count(); latent += 1) {
    if (isDead(latent)) dead += 1;
    else values[place(latent)] += 1;
  }
  const marks = Array.from({ length: -lowest + 1 }, (_, power) => [power * STEPS, percent(10 ** (power + lowest))]);
  const titles = (index, value) => `${value} latents from ${percent(10 ** (lowest + index / STEPS))}`;
  const here = view.latent === null || isDead(view.latent) ? -1 : place(view.latent);
  byId("densities").replaceChildren(bars(values, { titles, marks, here, width: 420 }), element("p", { class: "note" }, `share of tokens that activate a latent; ${dead} of ${count()} are dead in this text; heights are roots`));
}
