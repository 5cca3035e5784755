"use strict";
// One latent.

function drawLatent() {
  const latent = view.latent;
  if (latent === null) {
    byId("latent").replaceChildren(element("p", { class: "note" }, "Choose a latent."));
    return;
  }
  const title = element("h2", {}, `Latent ${latent} `);
  if (isDead(latent)) title.append(element("span", { class: "badge" }, "dead in this text"));
  const facts = [["density", percent(densityOf(latent))], ["active on", `${arrays.active[latent]} tokens`], ["mean there", short(arrays.mean[latent])], ["largest", short(arrays.largest[latent])]];
  byId("latent").replaceChildren(
    title, element("dl", {}, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
    element("div", { class: "columns" }, effects(latent, "promoted"), effects(latent, "suppressed")),
    ...neighbours(latent), ...values(latent), ...contexts(latent));
}

function effects(latent, kind) {
  const box = element("div", {}, element("h3", {}, `Tokens ${kind} `, element("span", {}, "straight, without later blocks")));
  if (!C) return element("div");
  const chips = Array.from({ length: C }, (_, index) => {
    const place = latent * C + index;
    const token = arrays[`${kind}_token`][place];
    return element("span", { title: `token ${token}` }, shown(token, { blanks: true }), element("small", {}, arrays[`${kind}_logit`][place].toFixed(2)));
  });
  box.append(element("div", { class: "chips", id: kind }, ...chips));
  return box;
}

function neighbours(latent) {
  const size = meta.num_neighbours;
  if (!size) return [];
  const chips = Array.from({ length: size }, (_, index) => {
    const other = arrays.neighbour[latent * size + index], token = peakToken(other);
    const label = `${other}${token === null ? "" : ` ${shown(token, { blanks: true })}`}`;
    const link = element("a", { href: `#latent=${other}`, "data-neighbour": other }, label, element("small", {}, arrays.cosine[latent * size + index].toFixed(2)));
    link.addEventListener("click", (event) => { event.preventDefault(); choose(other); });
    return link;
  });
  return [element("h3", {}, "Neighbours ", element("span", {}, "by cosine of decoder rows")), element("div", { class: "chips", id: "neighbours" }, ...chips)];
}

/** Where octave `index` of the histogram begins. */
const octave = (index) => 2 ** (meta.lowest_exponent + index);

function values(latent) {
  if (isDead(latent)) return [];
  const size = meta.num_bins, own = Array.from(arrays.histogram.subarray(latent * size, (latent + 1) * size));
  let [first, last] = [own.findIndex((value) => value > 0), own.findLastIndex((value) => value > 0)];
  const per = meta.bins_per_octave;
  first -= first % per;
  last += per - 1 - (last % per);
  const used = own.slice(first, last + 1);
  const marks = Array.from({ length: used.length / per + 1 }, (_, index) => [index * per, short(octave(first / per + index))]);
  const titles = (index, value) => `${value} tokens from ${short(octave((first + index) / per))}`;
  return [element("h3", {}, "Values where active ", element("span", {}, "logarithmic; heights are roots")), element("div", { id: "values" }, bars(used, { titles, marks }))];
}

function contexts(latent) {
  if (isDead(latent)) return [];
  const parts = [element("h3", {}, "Strongest contexts ", element("span", {}, "one a sequence")), group("top", latent, latent * K, K)];
  for (let index = meta.drawn.length - 1; index >= 0; index -= 1) {
    const first = latent * D + index * meta.num_drawn;
    if (arrays.drawn_position[first] === NONE) continue;
    const name = `Values from ${short(octave(meta.drawn[index]))} to ${short(octave(meta.drawn[index] + 1))} `;
    const per = meta.bins_per_octave, from = latent * meta.num_bins + meta.drawn[index] * per;
    const tokens = arrays.histogram.subarray(from, from + per).reduce((sum, value) => sum + value, 0);
    parts.push(element("h3", {}, name, element("span", {}, `${tokens} token${tokens > 1 ? "s" : ""}, drawn by chance`)), group("drawn", latent, first, meta.num_drawn));
  }
  return parts;
}

function group(kind, latent, first, size) {
  const box = element("div", { class: `contexts ${kind}` });
  for (let place = first; place < first + size; place += 1) {
    const position = arrays[`${kind}_position`][place];
    if (position === NONE) break;
    box.append(element("div", { class: "context" }, element("span", {}, short(arrays[`${kind}_value`][place])), tokensOf(latent, position, arrays[`${kind}_window`], place * W)));
  }
  return box;
}

function tokensOf(latent, position, windows, window) {
  const line = element("div", { class: "tokens" }), row = position - (position % meta.seq_len);
  const begin = Math.max(position - meta.width, row), end = Math.min(position + meta.width + 1, row + meta.seq_len);
  for (let at = begin; at < end; at += 1) {
    const token = text[at], share = windows[window + at - position + meta.width] / 255;
    const part = element("span", {}, shown(token));
    if (special.has(token)) part.classList.add("special");
    if (share > 0) {
      part.style.background = `rgb(var(--glow) / ${(0.12 + 0.75 * share).toFixed(2)})`;
      part.title = `${short(share * arrays.largest[latent])} (of ${short(arrays.largest[latent])} at most)`;
    }
    if (at === position) part.classList.add("peak");
    line.append(part);
  }
  return line;
}
