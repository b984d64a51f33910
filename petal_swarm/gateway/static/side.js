// The list of conversations: beside the talk, or, on narrow screens, over it.

import { button, el, icon } from "./dom.js";
import { TASKS } from "./tasks.js";
import { ago } from "./words.js";

const byId = (id) => document.getElementById(id);
const narrow = window.matchMedia("(max-width: 56rem)");

export class Side {
  /** `actions`: open(id), remove(id), isRunning(conversation). */
  constructor(store, actions) {
    this.store = store;
    this.actions = actions;
    this.node = byId("side");
    byId("open-side").addEventListener("click", () => this.#set(!this.isOpen));
    byId("veil").addEventListener("click", () => this.close());
    narrow.addEventListener("change", () => this.#set(false));
    this.#set(false);
  }

  /** Returns whether it was open. */
  close() {
    const wasOpen = this.isOpen;
    if (wasOpen) this.#set(false);
    return wasOpen;
  }

  show(current) {
    const items = this.store.list().map((conversation) => this.#item(conversation, conversation === current));
    byId("conversations").replaceChildren(...items);
  }

  #set(open) {
    this.isOpen = open;
    this.node.classList.toggle("open", open);
    this.node.inert = narrow.matches && !open;
    byId("veil").hidden = !open;
    byId("open-side").setAttribute("aria-expanded", String(open));
    if (open) byId("new").focus();
    else if (this.node.contains(document.activeElement)) byId("open-side").focus();
  }

  #item(conversation, current) {
    const { id, task, title, updated } = conversation;
    const running = this.actions.isRunning(conversation);
    const open = el(
      "button",
      { type: "button", class: "conversation", "aria-current": current ? "true" : null, on: { click: () => this.actions.open(id) } },
      icon(task in TASKS ? task : "chat"),
      el("span", { class: "conversation-title", text: title || "Untitled", title }),
      running ? el("span", { class: "dot pulsing" }) : el("span", { class: "when", text: ago(updated) }),
    );
    if (running) open.append(el("span", { class: "unseen", text: "being answered" }));
    const remove = button("trash", `Delete ${title}`, () => this.actions.remove(id), { bare: true });
    return el("li", {}, open, remove);
  }
}
