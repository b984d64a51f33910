// Numbers and servers in words.

const SIGNS = {
  joined: ["+", "good"],
  back: ["↻", "good"],
  serving: ["✓", "good"],
  free: ["✓", ""],
  gap_closed: ["✓", "good"],
  found: ["✓", "good"],
  left: ["−", ""],
  leaving: ["−", "info"],
  moving: ["→", "info"],
  moved: ["⇄", "info"],
  busy: ["≈", "warn"],
  failed: ["×", "bad"],
  gap_opened: ["!", "bad"],
  lost: ["!", "bad"],
};

/** The sign of an event's kind, and its colour. */
export const signOf = (kind) => SIGNS[kind] ?? ["·", ""];

/** "3", "0–11"; the ends are inclusive. */
export const rangeOf = ([start, end]) => (end - start === 1 ? `${start}` : `${start}–${end - 1}`);

/** "block 3", "blocks 0–11". */
export const blocks = (span) => `${span[1] - span[0] === 1 ? "block" : "blocks"} ${rangeOf(span)}`;

/** [4, 5, 6, 9] -> [[4, 7], [9, 10]] */
export function runs(numbers) {
  const found = [];
  for (const number of numbers) {
    const last = found.at(-1);
    if (last && last[1] === number) {
      last[1] = number + 1;
    } else {
      found.push([number, number + 1]);
    }
  }
  return found;
}

export function listOfRuns(numbers) {
  const parts = runs(numbers).map(rangeOf);
  const shown = parts.length > 6 ? [...parts.slice(0, 5), `${parts.length - 5} more`] : parts;
  const words = shown.length > 1 ? `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}` : shown[0];
  return `${numbers.length === 1 ? "Block" : "Blocks"} ${words}`;
}

// Marks that turn the direction of what follows, and what is no letter at all.
const UNSEEN = /[\u200e\u200f\u202a-\u202e\u2066-\u2069\p{Cc}]/gu;

/** What to call a server; its owner may have written anything. */
export const nameOf = (peer) => peer.name.replace(UNSEEN, "").trim() || `..${peer.id}`;

/** One of "serving", "busy", "joining", "silent": what a bar looks like. */
export function lookOf(peer) {
  if (peer.state === "no answer") return "silent";
  if (peer.state !== "serving") return "joining";
  return peer.busy ? "busy" : "serving";
}

const STATES = { serving: "serves", busy: "is busy", loading: "is loading", leaving: "is leaving", silent: "does not answer" };
const MARKS = { serving: "", busy: "≈ ", joining: "+ ", silent: "× " };

/** What it does while it is not ready: who loads has no memory yet, or has never answered. */
export const pauseOf = (peer) => (peer.rtt_s === null || !peer.kv_tokens ? "loading" : "leaving");
export const stateOf = (peer) => STATES[lookOf(peer) === "joining" ? pauseOf(peer) : lookOf(peer)];
export const markOf = (peer) => MARKS[lookOf(peer)];

export function seconds(value) {
  if (value >= 1) return `${value.toFixed(1)} s`;
  if (value === 0) return "0 ms";
  return value < 0.01 ? `${(value * 1e3).toPrecision(2)} ms` : `${Math.round(value * 1e3)} ms`;
}

export const rate = (value) => `${value >= 10 ? Math.round(value).toLocaleString("en") : value} tok/s`;
export const percent = (share) => `${Math.round(100 * share)} %`;

/** What is known of a server, as [what, how much]. */
export function factsOf(peer) {
  const facts = [["blocks", rangeOf(peer.span)]];
  if (peer.moving_to) facts.push(["moves to", blocks(peer.moving_to)]);
  if (peer.state === "serving") {
    facts.push(["speed", rate(peer.tokens_per_s)]);
    facts.push(["tokens in memory", peer.kv_tokens ? `${percent(peer.load)} of ${peer.kv_tokens.toLocaleString("en")}` : "–"]);
    facts.push(["waiting work", seconds(peer.queue_s)]);
  }
  if (peer.rtt_s !== null) facts.push(["round trip from here", seconds(peer.rtt_s)]);
  facts.push(["precision", peer.quant === "none" ? peer.dtype : `${peer.dtype}, ${peer.quant}`]);
  if (peer.adapters.length) facts.push(["adapters", peer.adapters.join(", ")]);
  if (peer.version) facts.push(["version", peer.version]);
  return facts;
}

/** All of it in one sentence, for those who listen. */
export function sentenceOf(peer) {
  const speed = peer.state === "serving" ? `, ${Math.round(peer.tokens_per_s)} tokens per second, ${percent(peer.load)} full` : "";
  const moving = peer.moving_to ? `, moving to ${blocks(peer.moving_to)}` : "";
  return `${nameOf(peer)} ${stateOf(peer)}: ${blocks(peer.span)}${speed}${moving}`;
}
