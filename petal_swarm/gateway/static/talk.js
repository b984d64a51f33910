// The page: conversations, what is asked, what is answered.

import { Answering } from "./answering.js";
import { fetchJson, fetchTrouble } from "./api.js";
import { Composer } from "./composer.js";
import { button, el } from "./dom.js";
import { SettingsPanel } from "./settings.js";
import { Side } from "./side.js";
import { Store } from "./store.js";
import { defaultOptions, examplesOf, requestFor, TASKS } from "./tasks.js";
import { Thread } from "./thread.js";
import { ranges } from "./words.js";

const LOOK_EVERY_MS = 20_000;
const LOOK_IN_TROUBLE_EVERY_MS = 3_000;
// The gateway looks at the swarm every few seconds: parts of an answer are newer than what it knows.
const HEARD_MS = 10_000;
const NO_KEY = "This gateway asks for a key. Put the one that its operator gave you into the settings.";
const MAX_TITLE = 60;
const byId = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.gateway = { models: [], limits: {}, needs_key: false };
    this.store = new Store(() => this.#changedElsewhere());
    this.answering = new Answering({
      onChange: (conversation, turn) => this.#answerChanged(conversation, turn),
      save: (conversation) => this.store.save(conversation),
    });
    this.thread = new Thread(byId("thread"), {
      retry: (turn) => this.#retry(turn),
      edit: (turn, text) => this.#edit(turn, text),
      settings: () => this.settings.open(),
      shorten: (turn) => this.#shorten(turn),
      canShorten: () => this.conversation.turns.length - (this.conversation.from ?? 0) > 2,
    });
    this.composer = new Composer({
      send: (text) => this.#send(text),
      stop: () => this.answering.stop(this.conversation),
    });
    this.settings = new SettingsPanel(this.store, {
      onChange: () => this.#showModel(),
      forget: () => this.#forgetAll(),
    });
    this.side = new Side(this.store, {
      open: (id) => this.open(id),
      remove: (id) => this.#remove(id),
      isRunning: (conversation) => this.answering.isRunning(conversation),
    });
    this.#makeTasks();
    this.#listen();
    this.open(location.hash.slice(1), { push: false });
    this.#meetGateway();
  }

  get model() {
    const { models } = this.gateway;
    return models.find(({ id }) => id === this.store.settings.model) ?? models[0] ?? null;
  }

  /** Show a conversation; a new one if there is none of this id. */
  open(id, { task = this.conversation?.task ?? "chat", push = true } = {}) {
    const options = { ...defaultOptions(), ...this.conversation?.options };
    this.conversation = this.store.conversations.get(id) ?? this.store.create(task, options);
    if (!Object.hasOwn(TASKS, this.conversation.task)) this.conversation.task = "chat";
    if (push) history.pushState(null, "", this.conversation.turns.length ? `#${this.conversation.id}` : "/");
    this.side.close();
    this.#show();
    window.scrollTo({ top: 0 });
    this.thread.goToEnd();
    this.composer.focus();
  }

  #listen() {
    byId("new").addEventListener("click", () => this.open(null));
    byId("open-settings").addEventListener("click", () => this.settings.open());
    byId("latest").addEventListener("click", () => this.thread.goToEnd());
    window.addEventListener("popstate", () => this.open(location.hash.slice(1), { push: false }));
    window.addEventListener("online", () => this.#meetGateway());
    window.addEventListener("pagehide", () => this.#saveRunning());
    document.addEventListener("visibilitychange", () => document.hidden || this.#meetGateway());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.defaultPrevented || byId("settings").open) return;
      if (!this.side.close()) this.answering.stop(this.conversation);
    });
    byId("to").addEventListener("change", () => this.#chooseLanguage());
  }

  // What is shown

  #show() {
    const { conversation } = this;
    for (const node of byId("tasks").children)
      node.setAttribute("aria-pressed", String(node.dataset.task === conversation.task));
    this.thread.show(conversation.turns, this.#emptyView());
    byId("main").classList.toggle("empty", !conversation.turns.length);
    this.composer.show(conversation.task, conversation.options, this.answering.isRunning(conversation));
    this.side.show(conversation);
    document.title = conversation.title ? `${conversation.title} · petal_swarm` : "petal_swarm";
    byId("title").textContent = conversation.title || "Talk with the swarm";
  }

  #makeTasks() {
    for (const [task, { label }] of Object.entries(TASKS)) {
      const node = button(task, label, () => this.#switchTo(task), { kind: "task" });
      node.dataset.task = task;
      byId("tasks").append(node);
    }
  }

  #emptyView() {
    const { task, options } = this.conversation;
    const { title, note } = TASKS[task];
    const suggestions = examplesOf(task, options).map((text) =>
      el("button", { type: "button", class: "example", text, on: { click: () => this.#send(text) } }),
    );
    return el(
      "section",
      { class: "welcome" },
      el("img", { src: "/static/logo.svg", alt: "", width: "72", height: "72" }),
      el("p", { class: "welcome-title", text: title }),
      el("p", { class: "hint", text: note ?? "Many computers run this model together. No account, no cost." }),
      el("div", { class: "examples" }, ...suggestions),
    );
  }

  #answerChanged(conversation, turn) {
    if (this.trouble && this.#hearsAnswer()) this.#showTrouble(null);
    if (conversation !== this.conversation) {
      if (turn.state !== "asked") this.side.show(this.conversation);
      return;
    }
    this.thread.update(turn);
    const running = this.answering.isRunning(conversation);
    if (running === this.composer.running) return;
    this.composer.setRunning(running);
    this.side.show(conversation);
    if (turn.state === "failed") this.#meetGateway();
  }

  #changedElsewhere() {
    if (this.answering.isRunning(this.conversation)) return;
    this.conversation = this.store.conversations.get(this.conversation.id) ?? this.conversation;
    this.#show();
    this.#showModel();
  }

  // What is done

  #chooseLanguage() {
    Object.assign(this.conversation.options, this.composer.options);
    if (!this.conversation.turns.length) this.#show();
  }

  #switchTo(task) {
    if (task === this.conversation.task) return this.composer.focus();
    return this.open(null, { task });
  }

  #send(text) {
    const { conversation } = this;
    if (this.answering.isRunning(conversation)) return false;
    const { task, options } = conversation;
    Object.assign(options, this.composer.options);
    const asked = task === "translate" ? { to: options.to, label: `to ${options.to}` } : {};
    if (task === "write") Object.assign(asked, { kind: options.kind, label: options.kind });
    conversation.turns.push({ role: "user", text, options: asked });
    if (!conversation.title) {
      conversation.title = titleOf(text);
      history.replaceState(null, "", `#${conversation.id}`);
    }
    this.#answer();
    return true;
  }

  #retry(turn) {
    const index = this.conversation.turns.indexOf(turn);
    if (index < 0 || this.answering.isRunning(this.conversation)) return;
    this.conversation.turns.splice(index);
    this.#answer();
  }

  #edit(turn, text) {
    const { turns } = this.conversation;
    const index = turns.indexOf(turn);
    this.answering.stop(this.conversation);
    turns.splice(index, turns.length, { ...turn, text });
    if (index === 0) this.conversation.title = titleOf(text);
    this.#answer();
  }

  /** Leave the older half of what has been said out of what is asked. */
  #shorten(turn) {
    const { conversation } = this;
    const from = conversation.from ?? 0;
    const half = from + Math.ceil((conversation.turns.length - from) / 4) * 2;
    conversation.from = Math.min(half, conversation.turns.length - 2);
    this.#retry(turn);
  }

  #answer() {
    const { conversation, model } = this;
    conversation.from = Math.min(conversation.from ?? 0, conversation.turns.length - 1);
    const said = conversation.turns.slice(conversation.from).filter(({ role, text }) => role === "user" || text.trim());
    const turn = { role: "assistant", text: "", options: {}, state: "asked" };
    conversation.turns.push(turn);
    conversation.updated = Date.now();
    const asked = model ?? { id: "default", has_chat_template: true };
    const request = requestFor(conversation.task, said, asked, this.settings.values);
    this.answering.answer(conversation, turn, request, this.store.settings.key);
    this.#show();
    this.thread.goToEnd();
  }

  #remove(id) {
    const removed = this.store.conversations.get(id);
    this.answering.stop(removed);
    this.store.remove(id);
    if (id === this.conversation.id) this.open(null);
    else this.#show();
    toast("Conversation deleted", "Undo", () => {
      this.store.save(removed);
      this.open(id);
    });
  }

  #forgetAll() {
    for (const conversation of this.store.list()) {
      this.answering.stop(conversation);
      this.store.remove(conversation.id);
    }
    this.open(null);
  }

  #saveRunning() {
    for (const conversation of this.store.list())
      if (this.answering.isRunning(conversation)) this.store.save(conversation);
  }

  // The gateway

  #lookAgain() {
    clearTimeout(this.looks);
    const look = () => (document.hidden ? this.#lookAgain() : this.#meetGateway());
    this.looks = setTimeout(look, this.trouble ? LOOK_IN_TROUBLE_EVERY_MS : LOOK_EVERY_MS);
  }

  #hearsAnswer() {
    return performance.now() - this.answering.heardAt < HEARD_MS;
  }

  async #meetGateway() {
    try {
      this.gateway = { ...this.gateway, ...(await fetchJson("/api/gateway")) };
      const trouble = await fetchTrouble();
      this.#showTrouble(this.#hearsAnswer() ? null : trouble);
    } catch {
      this.#showTrouble("The gateway does not answer. What you write is kept, and sent when you try again.");
    }
    this.#showModel();
    this.#lookAgain();
  }

  #showModel() {
    const { model } = this;
    byId("model-name").textContent = model ? model.id.split("/").at(-1) : "";
    this.settings.show(this.gateway, model);
    this.#showHealth();
  }

  #showTrouble(trouble) {
    this.trouble = trouble && ranges(trouble);
    this.#showHealth();
  }

  #showHealth() {
    if (this.trouble === undefined) return; // nothing is known yet
    const isShut = this.gateway.needs_key && !this.store.settings.key;
    const told = this.trouble ?? (isShut ? NO_KEY : null);
    byId("health").className = `dot ${this.trouble ? "bad" : isShut ? "warn" : "good"}`;
    byId("health").title = told ?? "The swarm is complete";
    const note = byId("trouble");
    note.hidden = !told;
    if (told && note.textContent !== told) note.textContent = told;
  }
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1).trimEnd()}…` : line;
}

let toastEnds = null;

function toast(text, action, onAction) {
  const node = byId("toast");
  const act = () => {
    node.hidden = true;
    onAction();
  };
  const offer = el("button", { type: "button", class: "quiet", text: action, on: { click: act } });
  node.replaceChildren(el("span", { text }), offer);
  node.hidden = false;
  clearTimeout(toastEnds);
  toastEnds = setTimeout(() => {
    node.hidden = true;
  }, 8000);
}

new Page();
