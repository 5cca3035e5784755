"use strict";
// Start, and whatever changes what is looked at. The state is in the address, so that a link opens it again.

/** List anew, from the top; the chosen latent stays chosen. */
function refresh() {
  listLatents();
  const match = byId("sort").querySelector("[value=match]");
  match.disabled = !view.matches;
  byId("count").textContent = view.listed.length === count() ? String(count()) : `${view.listed.length} of ${count()}`;
  byId("sort").value = view.sort;
  byId("direction").textContent = view.descending ? "↓" : "↑";
  drawHeads();
  byId("list").scrollTop = 0;
  drawList();
  keepAddress();
}

function choose(latent) {
  view.latent = latent;
  drawLatent();
  byId("latent").scrollTop = 0;
  reveal();
  drawList();
  drawDensities();
  keepAddress();
}

function sortBy(key, descending = view.sort === key ? !view.descending : key !== "number") {
  view.sort = key;
  view.descending = descending;
  refresh();
}

function setQuery(query) {
  const searched = Boolean(view.query.trim());
  view.query = query;
  // What matches best comes first, until another order is asked for.
  if (query.trim() && !searched && askedNumber() === null) [view.sort, view.descending] = ["match", true];
  if (!query.trim() && view.sort === "match") [view.sort, view.descending] = ["number", false];
  refresh();
  const number = askedNumber();
  if (number !== null) choose(number);
}

function keepAddress() {
  const order = view.sort === "number" && !view.descending ? "" : `${view.descending ? "-" : ""}${view.sort}`;
  const parts = { latent: view.latent, q: view.query, in: view.query && view.scope !== "contexts" ? view.scope : "", sort: order, alive: view.alive ? 1 : "" };
  const address = new URLSearchParams(Object.entries(parts).filter(([, value]) => value !== "" && value !== null)).toString();
  history.replaceState(null, "", address ? `#${address}` : location.pathname + location.search);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1)), sort = parts.get("sort") ?? "number", latent = parts.get("latent");
  view.query = parts.get("q") ?? "";
  view.scope = [...byId("scope").options].some((option) => option.value === parts.get("in")) ? parts.get("in") : "contexts";
  view.alive = parts.has("alive");
  view.descending = sort.startsWith("-");
  view.sort = Object.hasOwn(SORTS, sort.replace(/^-/, "")) ? sort.replace(/^-/, "") : "number";
  view.latent = latent !== null && /^\d+$/.test(latent) && Number(latent) < count() ? Number(latent) : null;
  byId("query").value = view.query;
  byId("scope").value = view.scope;
  byId("alive").checked = view.alive;
}

function openAddress() {
  readAddress();
  refresh();
  if (view.latent === null && view.listed.length) view.latent = view.listed[0];
  choose(view.latent);
}

async function start() {
  await readData();
  byId("name").textContent = meta.name;
  document.title = `${meta.name}: latents`;
  byId("about").textContent = `${count().toLocaleString("en")} latents of a ${meta.architecture} SAE at ${meta.hook} of ${meta.model}; ${meta.num_tokens.toLocaleString("en")} tokens of ${meta.text}`;
  byId("sort").append(...Object.entries(SORTS).map(([key, [title]]) => element("option", { value: key }, title)));
  watchList();
  let waiting = 0;
  byId("query").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => setQuery(event.target.value), 150);
  });
  byId("search-form").addEventListener("submit", (event) => event.preventDefault());
  byId("scope").addEventListener("change", (event) => { view.scope = event.target.value; refresh(); });
  byId("sort").addEventListener("change", (event) => sortBy(event.target.value, event.target.value !== "number"));
  byId("direction").addEventListener("click", () => sortBy(view.sort, !view.descending));
  byId("alive").addEventListener("change", (event) => { view.alive = event.target.checked; refresh(); });
  window.addEventListener("hashchange", openAddress);
  openAddress();
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  byId("about").textContent = `this page cannot be shown: ${error.message}`;
  throw error;
});
