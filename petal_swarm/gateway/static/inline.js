// The inside of a paragraph of Markdown: emphasis, code, links. Linear in the text, whatever it holds.

import { el } from "./dom.js";

const MAX_DEPTH = 6;
const LINK = /!?\[((?:[^[\]\\\n]|\\.)*)\]\( ?(<[^<>\n]*>|[^\s()<]*(?:\([^\s()]*\)[^\s()]*)*)(?: +"[^"\n]*")? *\)/y;
const ADDRESS = /<?(https?:\/\/[^\s<>"'`]+)>?/y;
const RUN = /(`+|\*+|_+|~+)/y;
const PLAIN = /[^\\`*_~[!<h\n]+/y;
const WORD = /[\p{L}\p{N}]/u;
const TAGS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

/** Append the text, as elements, to `parent`. */
export function appendInline(parent, text, depth = 0) {
  const pen = new Pen(parent);
  const missing = new Set(); // delimiters that nothing ends any more: looked for once, not once for each
  let at = 0;
  while (at < text.length) {
    const step = match(PLAIN, text, at);
    if (step) {
      pen.write(step[0]);
      at += step[0].length;
      continue;
    }
    at = special(pen, text, at, depth, missing);
  }
  pen.flush();
}

/** Deal with what stands at `at`, and return where to go on. */
function special(pen, text, at, depth, missing) {
  const character = text[at];
  if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
    pen.write(text[at + 1]);
    return at + 2;
  }
  if (character === "\n") {
    pen.add(el("br"));
    return at + 1;
  }
  if (character === "[" || character === "!") {
    const link = match(LINK, text, at);
    if (link) return at + addLink(pen, link, depth);
  } else if (character === "<" || character === "h") {
    const address = WORD.test(text[at - 1] ?? "") ? null : match(ADDRESS, text, at);
    if (address) return at + addAddress(pen, address);
  } else if ("`*_~".includes(character)) return delimited(pen, text, at, depth, missing);
  pen.write(character);
  return at + 1;
}

function delimited(pen, text, at, depth, missing) {
  const [run] = match(RUN, text, at);
  const start = at + run.length;
  const end = opens(text, at, run) && !missing.has(run) ? closer(text, start, run) : -1;
  if (end < 0) {
    if (opens(text, at, run)) missing.add(run);
    pen.write(run);
    return start;
  }
  const inside = text.slice(start, end);
  if (run[0] === "`") pen.add(el("code", { text: unpadded(inside.replaceAll("\n", " ")) }));
  else pen.add(emphasis(run, inside, depth));
  return end + run.length;
}

/** A space on both sides sets code apart from its backticks. */
function unpadded(code) {
  return code.trim() && code.startsWith(" ") && code.endsWith(" ") ? code.slice(1, -1) : code;
}

function emphasis(run, inside, depth) {
  const outer = el(TAGS[run] ?? "strong");
  const inner = run.length === 3 ? outer.appendChild(el("em")) : outer;
  if (depth < MAX_DEPTH) appendInline(inner, inside, depth + 1);
  else inner.append(inside);
  return outer;
}

function opens(text, at, run) {
  if (run[0] === "`") return true;
  if (run.length > 3 || (run[0] === "~" && run.length !== 2)) return false;
  const next = text[at + run.length] ?? " ";
  return !/\s/.test(next) && !(run[0] === "_" && WORD.test(text[at - 1] ?? ""));
}

function closer(text, from, run) {
  const runs = new RegExp(`\\${run[0]}+`, "g");
  runs.lastIndex = from;
  for (let found = runs.exec(text); found; found = runs.exec(text)) {
    if (found[0].length !== run.length || found.index === from) continue;
    if (run[0] === "`") return found.index;
    const inWord = run[0] === "_" && WORD.test(text[found.index + run.length] ?? "");
    if (!/[\s\\]/.test(text[found.index - 1]) && !inWord) return found.index;
  }
  return -1;
}

function addLink(pen, [whole, label, target], depth) {
  const address = safeAddress(target.replace(/^<|>$/g, ""));
  const words = label.trim() || target;
  if (!address) pen.write(whole);
  else {
    const link = anchor(address);
    if (depth < MAX_DEPTH) appendInline(link, words.replace(/https?:\/\//g, (scheme) => scheme.replace(":", "\\:")), depth + 1);
    else link.append(words);
    pen.add(link);
  }
  return whole.length;
}

function addAddress(pen, [whole, found]) {
  const angled = whole.startsWith("<") && whole.endsWith(">");
  const text = angled ? found : unbalanced(withoutEnd(found, ".,;:!?*_~]"));
  const address = safeAddress(text);
  if (!address) {
    pen.write(whole);
    return whole.length;
  }
  if (whole.startsWith("<") && !angled) pen.write("<");
  const link = anchor(address);
  link.textContent = text;
  pen.add(link);
  return angled ? whole.length : text.length + (whole.startsWith("<") ? 1 : 0);
}

/** Without a last parenthesis that the sentence opened. */
function unbalanced(address) {
  return address.endsWith(")") && !address.includes("(") ? withoutEnd(address, ").,;:!?") : address;
}

/** Without the characters at its end that are among these. */
export function withoutEnd(text, characters) {
  let end = text.length;
  while (end > 0 && characters.includes(text[end - 1])) end -= 1;
  return text.slice(0, end);
}

/** Only what a browser fetches as a page; never `javascript:`, `data:` or our own paths. */
function safeAddress(text) {
  if (!/^https?:\/\//i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

function anchor(address) {
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" });
}

function match(expression, text, at) {
  expression.lastIndex = at;
  return expression.exec(text);
}

/** Joins neighbouring text into one node. */
class Pen {
  constructor(parent) {
    this.parent = parent;
    this.text = "";
  }

  write(text) {
    this.text += text;
  }

  add(node) {
    this.flush();
    this.parent.append(node);
  }

  flush() {
    if (this.text) this.parent.append(this.text);
    this.text = "";
  }
}
