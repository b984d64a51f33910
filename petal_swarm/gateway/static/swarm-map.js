// The map: one element for each server, moved and coloured as the server changes. Names are text, never HTML.

import { blocks, lookOf, markOf, nameOf, pauseOf, rangeOf, rate, runs, sentenceOf } from "./swarm-words.js";

// Of how many servers on the map is packed, unless somebody has chosen otherwise.
const MANY = 40;
const LOOKS = ["serving", "busy", "joining", "silent"];
const STEPS = [1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, 200, 500, 1000];
const TICK_PX = 34;
// A bar in which fewer pixels are has no words: a name may be cut off, numbers must not.
const NARROW_PX = { name: 30, range: 52 };
const LEFT_MS = 450;
const VIEW_KEY = "petal_swarm.map.view";

export class SwarmMap {
  /** `elements`: sheet, axis, copies, lanes, lines, gaps, servers. `onChoose(peer, bar)` may get null. */
  constructor(elements, onChoose) {
    this.elements = elements;
    this.onChoose = onChoose;
    this.items = new Map();
    this.peers = [];
    this.numBlocks = 1;
    this.view = keptView();
    this.isFirst = true;
    this.chosen = null;
    this.#listen();
    new ResizeObserver(() => this.#fit()).observe(elements.sheet);
  }

  get isPacked() {
    return this.view ? this.view === "packed" : this.peers.length > MANY;
  }

  choose(view) {
    this.view = view;
    keepView(view);
    this.#place();
    this.#fit();
  }

  /** Draw it as it is now; `kinds` says what has happened, by server id. */
  draw(numBlocks, peers, missing, kinds = new Map()) {
    const { sheet } = this.elements;
    sheet.classList.toggle("still", this.isFirst);
    this.numBlocks = numBlocks;
    this.peers = [...peers].sort(inOrder);
    const there = new Set(this.peers.map((peer) => peer.id));
    for (const [id, item] of this.items) {
      if (!there.has(id)) this.#remove(id, item);
    }
    const fastest = Math.max(...this.peers.filter((peer) => peer.state === "serving").map(blocksPerS), 0);
    for (const peer of this.peers) this.#update(peer, fastest, kinds.get(peer.id));
    this.#place();
    this.#copies(missing);
    this.#gaps(missing);
    this.#fit();
    this.isFirst = false;
  }

  #update(peer, fastest, kind) {
    let item = this.items.get(peer.id);
    if (!item) {
      item = newItem(peer.id);
      this.items.set(peer.id, item);
      this.#animate(item.row, "came");
    } else if (kind) {
      this.#animate(item.row, "told");
    }
    item.peer = peer;
    const look = lookOf(peer);
    for (const each of LOOKS) item.row.classList.toggle(each, each === look);
    item.name.textContent = nameOf(peer);
    item.within.textContent = nameOf(peer);
    item.mark.textContent = markOf(peer);
    item.range.textContent = rangeOf(peer.span);
    item.figure.textContent = look === "serving" ? rate(peer.tokens_per_s) : { busy: "busy", joining: pauseOf(peer), silent: "no answer" }[look];
    item.bar.setAttribute("aria-label", sentenceOf(peer));
    span(item.bar, peer.span, this.numBlocks);
    const speed = fastest && peer.state === "serving" ? 1 + Math.log2(blocksPerS(peer) / fastest) / 4 : 0;
    item.row.style.setProperty("--speed", Math.max(0, speed).toFixed(2));
    item.row.style.setProperty("--load", look === "silent" ? 0 : peer.load);
    item.ghost.hidden = !peer.moving_to;
    if (peer.moving_to) span(item.ghost, peer.moving_to, this.numBlocks);
  }

  /** In which line each is: its own, or the first that has room. */
  #place() {
    const { sheet, lanes, servers } = this.elements;
    const ends = [];
    let before = null;
    this.peers.forEach((peer, index) => {
      const item = this.items.get(peer.id);
      let line = index;
      if (this.isPacked) {
        line = ends.findIndex((end) => end <= peer.span[0]);
        if (line < 0) line = ends.length;
        ends[line] = Math.max(peer.span[1], peer.moving_to?.[1] ?? 0);
      }
      item.row.style.setProperty("--line-number", line);
      const next = before ? before.nextSibling : servers.firstChild;
      if (next !== item.row) servers.insertBefore(item.row, next);
      before = item.row;
    });
    sheet.classList.toggle("packed", this.isPacked);
    lanes.style.setProperty("--rows", Math.max(2, this.isPacked ? ends.length : this.peers.length));
    this.#rove();
  }

  #remove(id, item) {
    this.items.delete(id);
    if (this.chosen === id) this.#pick(null);
    item.row.classList.add("left");
    setTimeout(() => item.row.remove(), LEFT_MS);
  }

  #animate(row, name) {
    if (this.isFirst) return;
    row.classList.remove("came", "told");
    requestAnimationFrame(() => row.classList.add(name));
  }

  #copies(missing) {
    const { copies } = this.elements;
    const counts = new Array(this.numBlocks).fill(0);
    for (const peer of this.peers) {
      if (peer.state !== "serving") continue;
      for (let block = peer.span[0]; block < Math.min(peer.span[1], this.numBlocks); block++) counts[block] += 1;
    }
    const most = Math.max(3, ...counts);
    while (copies.children.length > this.numBlocks) copies.lastChild.remove();
    while (copies.children.length < this.numBlocks) copies.append(document.createElement("i"));
    counts.forEach((count, block) => {
      const cell = copies.children[block];
      cell.style.setProperty("--share", count / most);
      cell.classList.toggle("none", count === 0);
      cell.title = `block ${block}: ${count === 0 ? "nobody" : count === 1 ? "1 server" : `${count} servers`}`;
    });
    const least = Math.min(...counts);
    copies.setAttribute(
      "aria-label",
      missing.length
        ? `Servers of each block: none of ${runs(missing).map(blocks).join(", ")}`
        : `Servers of each block: at least ${least}, at most ${Math.max(...counts)}`,
    );
  }

  #gaps(missing) {
    const { gaps } = this.elements;
    const wanted = new Map(runs(missing).map((run) => [run.join(":"), run]));
    for (const gap of [...gaps.children]) {
      if (!wanted.delete(gap.dataset.run)) gap.remove();
    }
    for (const [key, run] of wanted) {
      const gap = document.createElement("div");
      gap.dataset.run = key;
      span(gap, run, this.numBlocks);
      gaps.append(gap);
    }
  }

  /** What depends on how wide the sheet is: ticks, and which names fit in their bars. */
  #fit() {
    const { axis, lines, copies } = this.elements;
    const widthPx = copies.clientWidth;
    if (!widthPx) return;
    const blockPx = widthPx / this.numBlocks;
    copies.classList.toggle("many", blockPx < 4);
    const step = STEPS.find((each) => each * blockPx >= TICK_PX) ?? this.numBlocks;
    const key = `${step}/${this.numBlocks}`;
    if (axis.dataset.key !== key) {
      axis.dataset.key = key;
      axis.replaceChildren();
      lines.replaceChildren();
      for (let block = 0; block < this.numBlocks; block += step) {
        const tick = document.createElement("span");
        tick.textContent = block;
        span(tick, [block, block + 1], this.numBlocks);
        const line = document.createElement("i");
        span(line, [block, block + 1], this.numBlocks);
        axis.append(tick);
        lines.append(line);
      }
    }
    const narrowPx = this.isPacked ? NARROW_PX.name : NARROW_PX.range;
    for (const { bar, peer } of this.items.values()) {
      bar.classList.toggle("narrow", (peer.span[1] - peer.span[0]) * blockPx < narrowPx);
    }
  }

  /** One of the bars is in the order of the Tab key; arrows go from there to the others. */
  #rove() {
    const current = this.items.has(this.roving) ? this.roving : this.peers[0]?.id;
    this.roving = current;
    for (const [id, { bar }] of this.items) bar.tabIndex = id === current ? 0 : -1;
  }

  #listen() {
    const { servers } = this.elements;
    const idAt = (event) => event.target.closest?.(".server")?.dataset.id;
    servers.addEventListener("pointerover", (event) => event.pointerType === "mouse" && this.#pick(idAt(event)));
    servers.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.#pick(null));
    servers.addEventListener("focusin", (event) => {
      this.roving = idAt(event);
      this.#rove();
      this.#pick(this.roving);
    });
    servers.addEventListener("focusout", () => this.#pick(null));
    servers.addEventListener("click", (event) => this.#pick(idAt(event)));
    servers.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("scroll", () => this.#pick(null), { passive: true });
    document.addEventListener("click", (event) => servers.contains(event.target) || this.#pick(null));
  }

  #key(event) {
    const at = this.peers.findIndex((peer) => peer.id === this.roving);
    const last = this.peers.length - 1;
    const to = { ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.#pick(null);
    if (to === undefined) return;
    event.preventDefault();
    const peer = this.peers[Math.min(last, Math.max(0, to))];
    this.items.get(peer.id).bar.focus();
  }

  #pick(id) {
    this.items.get(this.chosen)?.bar.classList.remove("chosen");
    const item = this.items.get(id);
    this.chosen = item ? id : null;
    item?.bar.classList.add("chosen");
    this.onChoose(item?.peer ?? null, item?.bar ?? null);
  }
}

// Browsers that block storage throw on any access to it.

function keptView() {
  try {
    return localStorage.getItem(VIEW_KEY);
  } catch {
    return null;
  }
}

function keepView(view) {
  try {
    localStorage.setItem(VIEW_KEY, view);
  } catch {
    // It is chosen for this visit alone.
  }
}

function newItem(id) {
  const row = element("li", "server");
  row.dataset.id = id;
  const name = document.createElement("bdi");
  const figure = document.createElement("span");
  const label = element("div", "name");
  label.setAttribute("aria-hidden", "true");
  label.append(name, figure);
  const bar = element("button", "bar");
  bar.type = "button";
  const mark = document.createElement("span");
  const within = document.createElement("bdi");
  const inside = element("span", "in");
  const range = document.createElement("span");
  inside.append(mark, within, range);
  bar.append(inside);
  const ghost = element("span", "ghost");
  row.append(label, ghost, bar);
  return { row, name, figure, bar, mark, within, range, ghost, peer: null };
}

function element(tag, className) {
  const made = document.createElement(tag);
  made.className = className;
  return made;
}

function span(target, [start, end], numBlocks) {
  target.style.setProperty("--from", Math.min(start, numBlocks - 1) / numBlocks);
  target.style.setProperty("--to", Math.min(end, numBlocks) / numBlocks);
}

const blocksPerS = (peer) => peer.tokens_per_s * (peer.span[1] - peer.span[0]);

function inOrder(a, b) {
  return a.span[0] - b.span[0] || a.span[1] - b.span[1] || compare(a.name, b.name) || compare(a.id, b.id);
}

const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
