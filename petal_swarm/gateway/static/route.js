// The way of an answer's tokens through the swarm, drawn as a line of its hops.

import { el, icon } from "./dom.js";
import { milliseconds, rate, short } from "./words.js";

const MAX_HOPS = 64;
const MAX_NAME = 40;
const HUES = 6;

/** What is kept of a `swarm` chunk. Names come from strangers' servers. */
export function routeFrom(chunk) {
  const hops = Array.isArray(chunk.route) ? chunk.route.slice(0, MAX_HOPS) : [];
  return {
    hops: hops.map((hop) => ({
      peer: String(hop.peer_id ?? ""),
      name: String(hop.name || hop.peer_id || "a server").slice(0, MAX_NAME),
      blocks: [number(hop.blocks?.[0]) ?? 0, number(hop.blocks?.[1]) ?? 0],
      stepMs: number(hop.step_ms),
      totalMs: number(hop.total_ms),
    })),
    tokensPerS: number(chunk.tokens_per_s),
    firstTokenS: number(chunk.first_token_s),
    promptTokens: number(chunk.prompt_tokens),
    newTokens: number(chunk.new_tokens),
    repairs: number(chunk.repairs) ?? 0,
  };
}

function number(value) {
  return Number.isFinite(value) ? value : null;
}

/** The line and its figures, to be shown again with each chunk. */
export class RouteLine {
  constructor() {
    this.hops = el("ol", { class: "hops", "aria-label": "The way of this answer through the swarm" });
    this.figures = el("p", { class: "figures" });
  }

  update(route, running) {
    this.hops.hidden = !route?.hops.length;
    this.hops.classList.toggle("flowing", running);
    this.figures.replaceChildren(...(route ? figures(route) : []));
    if (this.hops.hidden) return;
    const shown = route.hops.map(({ peer, blocks }) => `${peer} ${blocks}`).join();
    if (shown !== this.shown) this.#draw(route.hops);
    this.shown = shown;
    route.hops.forEach((hop, index) => {
      const time = this.hops.children[index + 1].querySelector(".hop-time");
      time.textContent = hop.stepMs === null ? "" : milliseconds(hop.stepMs);
    });
  }

  #draw(hops) {
    const end = (text) => el("li", { class: "hop end" }, el("span", { class: "hop-name", text }));
    const colours = huesOf(hops);
    this.hops.replaceChildren(end("you"), ...hops.map((hop) => drawHop(hop, colours.get(idOf(hop)))), end("you"));
  }
}

function drawHop({ peer, name, blocks: [start, stop], totalMs }, colour) {
  const blocks = stop - start === 1 ? `block ${start}` : `blocks ${start}–${stop - 1}`;
  const details = [name, blocks, totalMs === null ? null : `${short(totalMs / 1000)} so far`, peer];
  return el(
    "li",
    { class: `hop hue-${colour}`, title: details.filter(Boolean).join("\n") },
    el("span", { class: "hop-name", text: name }),
    el("span", { class: "hop-time" }),
    el("span", { class: "unseen", text: `, ${blocks}` }),
  );
}

const idOf = ({ peer, name }) => peer || name;

/** The same peer, the same colour in every answer, unless another of the route has it and one is left. */
function huesOf(hops) {
  const found = new Map();
  for (const id of hops.map(idOf)) {
    if (found.has(id)) continue;
    const taken = new Set(found.size < HUES ? found.values() : []);
    let hue = sumOf(id) % HUES;
    while (taken.has(hue + 1)) hue = (hue + 1) % HUES;
    found.set(id, hue + 1);
  }
  return found;
}

function sumOf(text) {
  let sum = 0;
  for (const character of text) sum = (sum * 31 + character.codePointAt(0)) >>> 0;
  return sum;
}

function figures({ tokensPerS, firstTokenS, newTokens, repairs }) {
  const parts = [];
  if (tokensPerS) parts.push(el("span", { text: rate(tokensPerS) }));
  if (firstTokenS !== null) parts.push(el("span", { text: `first after ${short(firstTokenS)}` }));
  if (newTokens) parts.push(el("span", { text: `${newTokens} token${newTokens === 1 ? "" : "s"}` }));
  if (repairs) parts.push(el("span", { class: "repairs" }, icon("retry"), repaired(repairs)));
  return parts;
}

function repaired(count) {
  return count === 1 ? "a server left, another took over" : `${count} times a server left, and another took over`;
}
