// Markdown as models write it, made into elements: no HTML in it is ever read as HTML. Every expression here and
// in inline.js takes time in proportion to the text, whatever the text is.

import { copyButton, el } from "./dom.js";
import { appendCode } from "./highlight.js";
import { appendInline, withoutEnd } from "./inline.js";

const MAX_DEPTH = 6;
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))(?![^]*`)\s*(\S*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+•]|\d{1,9}[.)])(?:[ \t]+|$)/;
const TABLE_RULE = /^ {0,3}\|?(?: *:?-+:? *\|)+(?: *:?-+:?)? *$/;

/** Shows a text that grows: what was shown and has not changed is left as it is, so that a selection in it,
    or a button that has the focus, stays. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.shown = [];
  }

  update(text) {
    const blocks = split(text.replace(/\r\n?/g, "\n").split("\n"));
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.shown[same]?.source) same += 1;
    const isCode = blocks[same]?.kind === "code" && this.shown[same]?.kind === "code";
    const growing = isCode ? this.root.children[same] : null;
    const keep = growing ? same + 1 : same;
    while (this.root.children.length > keep) this.root.lastChild.remove();
    if (growing) fillCode(growing, blocks[same]);
    for (const block of blocks.slice(keep)) this.root.append(render(block, 0));
    this.shown = blocks;
  }
}

/** Lines as blocks: {kind, source, ...}. */
function split(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = take(lines, at);
    block.source = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

/** The block that begins at a line, and where it ends. */
function take(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return takeCode(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: withoutEnd(heading[2], "# \t") }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) return takeQuote(lines, at);
  if (ITEM.test(line)) return takeList(lines, at);
  if (isTable(lines, at)) return takeTable(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end += 1;
  const text = lines.slice(at, end).map((each) => each.trim());
  return [{ kind: "paragraph", text: text.join("\n") }, end];
}

function interrupts(lines, at) {
  const line = lines[at];
  const starts = FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
  return starts || ITEM.test(line) || isTable(lines, at);
}

function takeCode(lines, at, [, mark, language]) {
  const closing = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  return [{ kind: "code", language: language.toLowerCase(), text }, Math.min(end + 1, lines.length)];
}

function takeQuote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return [{ kind: "quote", lines: lines.slice(at, end).map((line) => line.replace(QUOTE, "")) }, end];
}

/** Items of one indentation; what is indented more belongs to the item above it. */
function takeList(lines, at) {
  const [, indent, first] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    const own = item && item[1].length < indent.length + 2 && item[1].length >= indent.length - 1;
    if (own && !RULE.test(lines[end])) {
      if (/\d/.test(item[2]) !== ordered) break;
      items.push([lines[end].slice(item[0].length)]);
    } else if (!continues(lines, end, indent.length)) break;
    else items.at(-1).push(lines[end]);
    end += 1;
  }
  while (!lines[end - 1].trim()) end -= 1;
  const start = ordered ? Number.parseInt(first, 10) : null;
  return [{ kind: "list", start, items: items.map(dedent) }, end];
}

/** Whether a line that begins no item of this list belongs to the last one. */
function continues(lines, at, indent) {
  const line = lines[at];
  if (!line.trim()) return lines.slice(at + 1, at + 3).some((next) => next.trim()) && !endsList(lines, at, indent);
  if (depthOf(line) > indent) return true;
  return Boolean(lines[at - 1].trim()) && !interrupts(lines, at);
}

function endsList(lines, at, indent) {
  let next = at + 1;
  while (next < lines.length && !lines[next].trim()) next += 1;
  const item = ITEM.exec(lines[next] ?? "");
  return !(item && item[1].length >= indent - 1) && depthOf(lines[next] ?? "") <= indent;
}

function depthOf(line) {
  return line.length - line.trimStart().length;
}

function dedent([first, ...rest]) {
  const depths = rest.filter((line) => line.trim()).map(depthOf);
  const least = depths.length ? Math.min(...depths) : 0;
  return [first, ...rest.map((line) => line.slice(least))];
}

function isTable(lines, at) {
  return lines[at].includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-");
}

function takeTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const aligned = cells(lines[at + 1]).map((rule) => {
    if (!rule.endsWith(":")) return null;
    return rule.startsWith(":") ? "center" : "right";
  });
  const rows = lines.slice(at + 2, end).map(cells);
  return [{ kind: "table", head: cells(lines[at]), rows, aligned }, end];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function render(block, depth) {
  switch (block.kind) {
    case "code":
      return renderCode(block);
    case "heading":
      return withInline(el(`h${Math.min(6, block.level + 2)}`), block.text); // the page has h1 and h2
    case "rule":
      return el("hr");
    case "quote":
      return renderAll(el("blockquote"), block.lines, depth);
    case "list":
      return renderList(block, depth);
    case "table":
      return renderTable(block);
    default:
      return withInline(el("p"), block.text);
  }
}

function renderAll(parent, lines, depth) {
  if (depth >= MAX_DEPTH) return withInline(parent, lines.join("\n"));
  parent.append(...split(lines).map((block) => render(block, depth + 1)));
  return parent;
}

function renderList({ start, items }, depth) {
  const list = start === null ? el("ul") : el("ol", start === 1 ? {} : { start });
  for (const lines of items) {
    const task = /^\[([ xX])\]\s+/.exec(lines[0]);
    const item = el("li", task ? { class: "todo" } : {});
    if (task) item.append(el("input", { type: "checkbox", disabled: true, checked: task[1] !== " " }));
    renderAll(item, task ? [lines[0].slice(task[0].length), ...lines.slice(1)] : lines, depth);
    list.append(item);
  }
  return list;
}

function renderTable({ head, rows, aligned }) {
  const cell = (tag, texts, column) => withInline(el(tag, { "data-align": aligned[column] }), texts[column] ?? "");
  const row = (tag, texts) => el("tr", {}, ...head.map((_, column) => cell(tag, texts, column)));
  const body = el("tbody", {}, ...rows.map((texts) => row("td", texts)));
  const table = el("table", {}, el("thead", {}, row("th", head)), body);
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

function renderCode(block) {
  const code = el("code");
  const head = el("div", { class: "code-head" }, el("span", { class: "code-language" }));
  head.append(copyButton("Copy code", () => code.textContent));
  const pre = el("pre", { tabindex: "0" }, code);
  const figure = el("figure", { class: "code" }, head, pre);
  fillCode(figure, block);
  return figure;
}

function fillCode(figure, { language, text }) {
  figure.querySelector(".code-language").textContent = language || "text";
  const code = figure.querySelector("code");
  code.replaceChildren();
  appendCode(code, text, language);
}

function withInline(parent, text) {
  appendInline(parent, text);
  return parent;
}
