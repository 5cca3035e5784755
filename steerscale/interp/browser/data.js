"use strict";
// The data: one compressed block of a JSON head and typed arrays. All text in it reaches the page as text nodes only.

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
const NONE = 0xffffffff;
let meta, vocabulary, special, arrays, K, D, W, C, text, largestDensity;

async function readData() {
  const packed = atob(document.getElementById("blob").textContent);
  const bytes = new Uint8Array(packed.length);
  for (let index = 0; index < packed.length; index += 1) bytes[index] = packed.charCodeAt(index);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  ({ meta, vocabulary } = head);
  special = new Set(head.special);
  arrays = Object.fromEntries(Object.entries(head.arrays).map(([name, [kind, offset, size]]) => [name, new ARRAYS[kind](buffer, offset, size)]));
  [K, D, W, C] = [meta.num_top, meta.drawn.length * meta.num_drawn, 2 * meta.width + 1, meta.num_effects];
  text = arrays.text;
}

const count = () => meta.num_latents;
const densityOf = (latent) => arrays.active[latent] / meta.num_tokens;
const isDead = (latent) => arrays.active[latent] === 0;
const effectOf = (latent) => (C ? arrays.promoted_logit[latent * C] : 0);

/** The token at the strongest place, or the most promoted one of a dead latent. */
function peakToken(latent) {
  const position = arrays.top_position[latent * K];
  return position === NONE ? null : text[position];
}

/** A token as it is shown: line ends and tabs are made visible, and outer blanks too where they would be lost. */
function shown(token, { blanks = false } = {}) {
  const plain = (vocabulary[token] ?? `<${token}>`).replace(/\n/g, "↵").replace(/\r/g, "␍").replace(/\t/g, "⇥");
  return blanks ? plain.replace(/^ +| +$/g, (found) => "·".repeat(found.length)) : plain;
}

/** An element with attributes and children; strings become text, never markup. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);
const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4))));
const percent = (share) => (share === 0 ? "0" : share < 1e-4 ? `${(100 * share).toExponential(1)}%` : `${Number((100 * share).toPrecision(3))}%`);

/** Bars over labelled places; `marks` are [index, label]. */
function bars(values, { titles, marks, here = -1, width = 600, height = 70 }) {
  const most = Math.max(...values, 1);
  const step = width / values.length;
  const picture = drawing("svg", { viewBox: `0 0 ${width} ${height + 16}`, role: "img" });
  values.forEach((value, index) => {
    // The root shows the few beside the many.
    const size = value ? Math.max(Math.sqrt(value / most) * height, 1.5) : 0;
    const bar = drawing("rect", { x: index * step + 0.5, y: height - size, width: Math.max(step - 1, 0.5), height: size, class: index === here ? "here" : "" });
    bar.append(drawing("title", {}, titles(index, value)));
    picture.append(bar);
  });
  picture.append(drawing("line", { x1: 0, x2: width, y1: height, y2: height }));
  for (const [index, label] of marks) {
    picture.append(drawing("text", { x: index * step, y: height + 12, "text-anchor": index === 0 ? "start" : index === values.length ? "end" : "middle" }, label));
  }
  return picture;
}
