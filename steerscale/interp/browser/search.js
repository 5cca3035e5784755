"use strict";
// Which latents are listed, in which order: `view` is the state of the page.

const SORTS = {
  number: ["number", (latent) => latent],
  density: ["density", densityOf],
  max: ["largest value", (latent) => arrays.largest[latent]],
  mean: ["mean where active", (latent) => arrays.mean[latent]],
  effect: ["largest token effect", effectOf],
  match: ["matches of the search", (latent) => view.matches?.get(latent) ?? 0],
};
const view = { query: "", scope: "contexts", sort: "number", descending: false, alive: false, latent: null, listed: [], matches: null };

/** The whole text as one string, and where each token begins in it; made when it is first searched. */
let joined = null;

function joinedText() {
  if (joined) return joined;
  const pieces = [], begins = new Uint32Array(text.length + 1);
  let at = 0;
  for (let index = 0; index < text.length; index += 1) {
    begins[index] = at;
    // A sequence ends: nothing is found across it.
    const piece = lowered(vocabulary[text[index]] ?? "") + ((index + 1) % meta.seq_len === 0 ? "\0" : "");
    pieces.push(piece);
    at += piece.length;
  }
  begins[text.length] = at;
  joined = { string: pieces.join(""), begins };
  return joined;
}

/** Lower case of the same length for all of a text's parts. */
const lowered = (string) => string.toLowerCase();

/** For every token, how many tokens before it are touched by a match. */
function touchedBefore(wanted) {
  const { string, begins } = joinedText();
  const touched = new Uint32Array(text.length + 1);
  let token = 0;
  for (let at = string.indexOf(wanted); at >= 0; at = string.indexOf(wanted, at + 1)) {
    while (begins[token + 1] <= at) token += 1;
    for (let other = token; other < text.length && begins[other] < at + wanted.length; other += 1) touched[other + 1] = 1;
  }
  for (let index = 0; index < text.length; index += 1) touched[index + 1] += touched[index];
  return touched;
}

/** Latents that the search finds, each with how well; null where nothing is asked. */
function search() {
  const wanted = lowered(view.query);
  if (!wanted.trim()) return null;
  if (view.scope === "promoted" || view.scope === "suppressed") return searchEffects(wanted.trim(), view.scope);
  const found = new Map(), touched = touchedBefore(wanted), sides = view.scope === "peak" ? 0 : meta.width;
  for (let latent = 0; latent < count(); latent += 1) {
    let score = 0;
    for (let place = latent * K; place < (latent + 1) * K; place += 1) {
      const position = arrays.top_position[place];
      if (position === NONE) break;
      const row = position - (position % meta.seq_len);
      const begin = Math.max(position - sides, row), end = Math.min(position + sides + 1, row + meta.seq_len);
      if (touched[end] === touched[begin]) continue;
      // The token itself counts more than what stands around it.
      score += touched[position + 1] > touched[position] ? 100 : 1;
    }
    if (score) found.set(latent, score);
  }
  return found;
}

function searchEffects(wanted, scope) {
  const found = new Map(), tokens = arrays[`${scope}_token`], logits = arrays[`${scope}_logit`];
  const hits = new Uint8Array(vocabulary.map((piece) => (lowered(piece).includes(wanted) ? 1 : 0)));
  for (let place = 0; place < tokens.length; place += 1) {
    if (!hits[tokens[place]]) continue;
    const latent = Math.floor(place / C);
    found.set(latent, Math.max(found.get(latent) ?? 0, Math.abs(logits[place])));
  }
  return found;
}

/** The number of a latent that the query is, else null. */
function askedNumber() {
  const match = /^\s*#?(\d+)\s*$/.exec(view.query);
  return match && Number(match[1]) < count() ? Number(match[1]) : null;
}

function listLatents() {
  const number = askedNumber();
  view.matches = number === null ? search() : null;
  let listed = number === null ? (view.matches ? [...view.matches.keys()] : Array.from({ length: count() }, (_, latent) => latent)) : [number];
  if (view.alive && number === null) listed = listed.filter((latent) => !isDead(latent));
  const [, value] = SORTS[view.sort], sign = view.descending ? -1 : 1;
  listed.sort((one, other) => sign * (value(one) - value(other)) || one - other);
  view.listed = listed;
}
