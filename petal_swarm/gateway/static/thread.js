// The turns of a conversation, as they are said.

import { announce, button, copyButton, el, icon } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { RouteLine } from "./route.js";
import { place } from "./words.js";

const NEAR_END_PX = 120;

export class Thread {
  /** `actions`: retry(turn), edit(turn, text), settings(), shorten(turn), canShorten(). */
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.views = new Map();
    this.changed = new Set();
    this.follows = true;
    this.top = 0;
    window.addEventListener("scroll", () => this.#look(), { passive: true });
    window.addEventListener("resize", () => this.follow(), { passive: true });
  }

  /** Show these turns, and nothing else; `empty` if there are none. */
  show(turns, empty) {
    const known = this.views;
    this.views = new Map();
    for (const turn of turns) this.views.set(turn, known.get(turn) ?? this.#make(turn));
    this.root.replaceChildren(...(turns.length ? [...this.views.values()].map(({ node }) => node) : [empty]));
    for (const turn of turns) this.views.get(turn).render(turn === turns.at(-1));
  }

  /** Show what has changed in a turn, with the next picture. */
  update(turn) {
    if (!this.views.has(turn)) return;
    if (!this.changed.size) requestAnimationFrame(() => this.#renderChanged());
    this.changed.add(turn);
  }

  /** Go to the end, and stay there while more comes. */
  goToEnd() {
    this.follows = true;
    this.follow();
  }

  follow() {
    if (this.follows) window.scrollTo({ top: document.documentElement.scrollHeight });
  }

  #renderChanged() {
    const last = [...this.views.keys()].at(-1);
    for (const turn of this.changed) this.views.get(turn)?.render(turn === last);
    this.changed.clear();
    this.follow();
  }

  /** Who scrolls up wants to read there; that the text has grown below says nothing. */
  #look() {
    const { scrollHeight } = document.documentElement;
    const near = window.scrollY + window.innerHeight > scrollHeight - NEAR_END_PX;
    if (near) this.follows = true;
    else if (window.scrollY < this.top) this.follows = false;
    this.top = window.scrollY;
    document.getElementById("latest").hidden = near || this.follows;
  }

  #make(turn) {
    return turn.role === "user" ? new Question(turn, this.actions) : new Answer(turn, this.actions);
  }
}

class Question {
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.body = el("div", { class: "bubble" });
    const copy = copyButton("Copy", () => turn.text, { bare: true });
    this.buttons = el("div", { class: "actions" }, copy, button("edit", "Edit", () => this.#edit(), { bare: true }));
    const who = el("h2", { class: "unseen", text: "You" });
    this.node = el("article", { class: "turn question" }, who, this.buttons, this.body);
  }

  render() {
    const { text, options } = this.turn;
    const label = options.label ? el("p", { class: "tag", text: options.label }) : null;
    this.body.replaceChildren(...[el("p", { class: "said", text }), label].filter(Boolean));
    this.buttons.hidden = false;
    this.node.classList.remove("editing");
  }

  #edit() {
    const area = el("textarea", { class: "input", "aria-label": "Edit the message" });
    area.value = this.turn.text;
    const save = () => area.value.trim() && this.actions.edit(this.turn, area.value.trim());
    const cancel = () => {
      this.render();
      this.buttons.lastChild.focus();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const hint = this.node.nextElementSibling?.nextElementSibling ? "What came after is removed." : "";
    const row = el("div", { class: "edit-row" }, el("p", { class: "hint", text: hint }));
    row.append(el("button", { type: "button", class: "quiet", text: "Cancel", on: { click: cancel } }));
    row.append(el("button", { type: "button", class: "button primary", text: "Ask again", on: { click: save } }));
    this.body.replaceChildren(area, row);
    this.buttons.hidden = true;
    this.node.classList.add("editing");
    area.rows = Math.min(12, area.value.split("\n").length + Math.ceil(area.value.length / 70));
    area.focus();
  }
}

class Answer {
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.stage = el("div", { class: "stage", hidden: true });
    const prose = el("div", { class: "prose" });
    this.markdown = new MarkdownView(prose);
    this.note = el("div", { class: "after" });
    this.route = new RouteLine();
    this.retry = button("retry", "Ask again", () => actions.retry(turn), { bare: true });
    this.buttons = el("div", { class: "actions" }, copyButton("Copy", () => turn.text.trim(), { bare: true }), this.retry);
    const who = el("h2", { class: "unseen", text: "Answer" });
    const foot = el("div", { class: "foot" }, this.route.figures, this.buttons);
    this.node = el("article", { class: "turn answer" }, who, this.stage, prose, this.note, this.route.hops, foot);
  }

  render(last) {
    const { turn } = this;
    const asked = turn.state === "asked";
    if (turn.text !== this.text) this.markdown.update(turn.text.trim());
    this.text = turn.text;
    this.#renderStage(asked && !turn.text ? turn.stage : null);
    this.route.update(turn.state === "failed" ? null : turn.route, asked); // it led nowhere
    if (turn.state !== this.state || turn.error !== this.error) this.#renderNote();
    this.error = turn.error;
    this.#tell(asked);
    this.state = turn.state;
    this.node.setAttribute("aria-busy", String(asked));
    this.node.classList.toggle("running", asked);
    this.node.classList.toggle("last", last);
    this.buttons.hidden = asked;
    this.buttons.firstChild.hidden = !turn.text;
    this.retry.hidden = !last || turn.state === "failed"; // then the note offers it
  }

  #renderStage(stage) {
    this.stage.hidden = !stage;
    if (!stage) return;
    if (!this.stage.firstChild) this.stage.append(bloom(), el("p"), el("progress", { "aria-hidden": "true" }));
    const [, words, progress] = this.stage.children;
    const queued = stage.state === "queued";
    words.textContent = queued ? place(stage) : stage.state === "opening" ? "Finding a way through the swarm" : "Thinking";
    progress.hidden = !(queued && stage.of > 1);
    if (!progress.hidden) {
      progress.max = stage.of;
      progress.value = Math.max(0, stage.of - stage.place);
    }
    if (words.textContent !== this.told) announce(words.textContent);
    this.told = words.textContent;
  }

  #renderNote() {
    const { state, error, finish, text } = this.turn;
    this.note.replaceChildren();
    if (state === "failed" && error) this.note.append(this.#problem(error));
    else
      for (const words of remarks(state, finish, Boolean(text.trim())))
        this.note.append(el("p", { class: "hint", text: words }));
  }

  #problem({ title, text, action, waitS }) {
    const words = el("div", {}, el("strong", { text: title }), el("p", { text }), el("div", { class: "offers" }));
    const offer = (label, onClick) => {
      const node = el("button", { type: "button", class: "button", text: label, on: { click: onClick } });
      words.lastChild.append(node);
      return node;
    };
    if (action === "shorten" && this.actions.canShorten())
      offer("Go on without the oldest messages", () => this.actions.shorten(this.turn));
    else if (action !== "shorten") countDown(offer("Try again", () => this.actions.retry(this.turn)), waitS);
    if (action === "settings") offer("Open settings", () => this.actions.settings());
    if (action === "swarm")
      words.lastChild.append(el("a", { class: "button", href: "/swarm", text: "Look at the swarm" }));
    return el("div", { class: "note bad", role: "alert" }, icon("alert"), words);
  }

  #tell(asked) {
    if (asked && this.turn.text && this.told) announce("The answer comes");
    if (this.turn.text) this.told = null;
    if (this.state !== "asked" || asked) return;
    if (this.turn.state === "done") announce(`Answer: ${this.turn.text.trim().slice(0, 2000)}`);
    else if (this.turn.state === "stopped") announce("Stopped");
  }
}

/** What is to be said of an answer that did not end by itself. */
function remarks(state, finish, hasText) {
  if (state === "stopped") return [hasText ? "You stopped this answer." : "You stopped before an answer came."];
  if (state === "left") return ["The page was left before this answer was complete."];
  if (state === "done" && !hasText) return ["The model answered with nothing. Ask again, or in other words."];
  return finish === "length" ? ["Cut at the longest answer that the settings allow."] : [];
}

/** The logo's petals, one after the other. */
function bloom() {
  return el("span", { class: "bloom", "aria-hidden": "true" }, ...Array.from({ length: 5 }, () => el("i")));
}

/** Say on a button when pressing it makes sense; it may be pressed before. */
function countDown(node, waitS) {
  if (!waitS || waitS > 600) return;
  const until = performance.now() + waitS * 1000;
  const show = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    node.textContent = left > 0 ? `Try again (in ${left} s)` : "Try again";
    if (left > 0 && (node.isConnected || !node.dataset.seen)) setTimeout(show, 1000);
    node.dataset.seen = "yes";
  };
  show();
}
