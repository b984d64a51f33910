// Where visitors write: the field, the task's options, send and stop.

import { el } from "./dom.js";
import { KINDS, LANGUAGES, TASKS } from "./tasks.js";

const byId = (id) => document.getElementById(id);
const isFinger = () => window.matchMedia("(pointer: coarse)").matches;

export class Composer {
  /** `send(text)` returns whether the text was taken. */
  constructor({ send, stop }) {
    this.running = false;
    this.area = byId("text");
    byId("to").append(...Object.keys(LANGUAGES).map((name) => el("option", { text: name })));
    byId("kind").append(...Object.keys(KINDS).map((name) => el("option", { text: name })));
    const submit = () => {
      const text = this.area.value.trim();
      if (!text || this.running || !send(text)) return;
      this.area.value = "";
      this.#fit();
    };
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    byId("composer").addEventListener("click", ({ target }) => {
      if (!target.closest("button, select, label")) this.area.focus();
    });
    byId("stop").addEventListener("click", () => {
      stop();
      this.focus();
    });
    this.area.addEventListener("input", () => this.#fit());
    this.area.addEventListener("keydown", (event) => {
      // With fingers, Enter is the only way to a new line.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || isFinger()) return;
      event.preventDefault();
      submit();
    });
  }

  /** What the visitor chose for the task. */
  get options() {
    return { to: byId("to").value, kind: byId("kind").value };
  }

  show(task, options, running) {
    const { placeholder } = TASKS[task];
    this.area.placeholder = placeholder;
    byId("text-label").textContent = placeholder;
    byId("to-option").hidden = task !== "translate";
    byId("kind-option").hidden = task !== "write";
    if (options.to in LANGUAGES) byId("to").value = options.to;
    if (options.kind in KINDS) byId("kind").value = options.kind;
    this.setRunning(running);
    this.#fit();
  }

  setRunning(running) {
    const focused = document.activeElement === byId("stop");
    this.running = running;
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    byId("keys").hidden = running;
    byId("keys-running").hidden = !running;
    if (focused) this.focus();
    this.#fit();
  }

  /** On a phone this would open the keyboard over what is to be read. */
  focus() {
    if (!isFinger()) this.area.focus({ preventScroll: true });
  }

  #fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
    byId("send").disabled = !this.area.value.trim();
  }
}
