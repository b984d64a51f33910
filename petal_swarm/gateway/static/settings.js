// Settings: folded away, each kept as soon as it is changed.

import { el } from "./dom.js";

const LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096, 8192];
const byId = (id) => document.getElementById(id);

export class SettingsPanel {
  /** `onChange()` after each change; `forget()` deletes all conversations. */
  constructor(store, { onChange, forget }) {
    this.store = store;
    this.longest = LENGTHS.at(-1);
    this.dialog = byId("settings");
    const change = (changes) => {
      store.saveSettings(changes);
      onChange();
    };
    byId("model").addEventListener("change", ({ target }) => change({ model: target.value }));
    byId("temperature").addEventListener("input", ({ target }) => change({ temperature: Number(target.value) }));
    byId("temperature-auto").addEventListener("change", ({ target }) =>
      change({ temperature: target.checked ? null : Number(byId("temperature").value) }),
    );
    byId("length").addEventListener("change", ({ target }) => change({ maxTokens: Number(target.value) }));
    byId("system").addEventListener("change", ({ target }) => change({ system: target.value.trim() }));
    byId("key").addEventListener("change", ({ target }) => change({ key: target.value.trim() }));
    this.dialog.addEventListener("click", ({ target }) => target === this.dialog && this.dialog.close());
    this.#makeForget(forget);
  }

  /** As requests need them. */
  get values() {
    const { settings } = this.store;
    return { ...settings, maxTokens: Math.min(settings.maxTokens, this.longest) };
  }

  open() {
    byId("system").value = this.store.settings.system;
    byId("key").value = this.store.settings.key;
    this.dialog.showModal();
  }

  /** Show what this gateway offers, and what is chosen. */
  show({ models, limits, needs_key: needsKey, takes_keys: takesKeys }, model) {
    const { settings } = this.store;
    const names = models.map(({ id }) => id).join("\n");
    if (names !== this.names) byId("model").replaceChildren(...models.map(option));
    this.names = names;
    byId("model").value = model?.id ?? "";
    byId("model-hint").textContent = model ? describe(model) : "The gateway has not said yet which models it has.";
    this.longest = Math.min(limits?.max_tokens || LENGTHS.at(-1), model?.context_tokens || Infinity);
    this.#showLengths(settings.maxTokens);
    const auto = settings.temperature === null;
    byId("temperature-auto").checked = auto;
    byId("temperature").value = settings.temperature ?? 0.7;
    byId("temperature").classList.toggle("auto", auto);
    byId("temperature-value").textContent = auto ? "" : settings.temperature.toFixed(1);
    byId("key-hint").textContent = needsKey
      ? "This gateway asks for a key. It is kept in this browser."
      : takesKeys
        ? "Not needed here. With one, limits may be wider."
        : "Not needed: this gateway has no keys.";
  }

  #showLengths(chosen) {
    const offered = LENGTHS.filter((tokens) => tokens <= this.longest);
    if (!offered.length) offered.push(this.longest);
    if (offered.join() !== this.offered)
      byId("length").replaceChildren(...offered.map((value) => el("option", { value, text: inWords(value) })));
    this.offered = offered.join();
    byId("length").value = String(offered.findLast((tokens) => tokens <= chosen) ?? offered[0]);
  }

  #makeForget(forget) {
    const node = byId("forget");
    const rest = () => {
      node.textContent = "Delete all conversations";
      node.classList.remove("sure");
    };
    node.addEventListener("click", () => {
      if (node.classList.contains("sure")) {
        rest();
        this.dialog.close();
        forget();
      } else {
        node.textContent = "Really delete all?";
        node.classList.add("sure");
      }
    });
    node.addEventListener("blur", rest);
  }
}

function option({ id, is_adapter: isAdapter }) {
  return el("option", { value: id, text: isAdapter ? `${id} (adapter)` : id });
}

function describe({ has_chat_template: chats, context_tokens: context, is_adapter: isAdapter }) {
  const parts = [isAdapter ? "An adapter on top of the model." : null];
  parts.push(chats ? "Trained for conversations." : "Only continues texts: examples show it what is asked.");
  if (context) parts.push(`Reads up to ${context.toLocaleString("en")} tokens at once.`);
  return parts.filter(Boolean).join(" ");
}

function inWords(tokens) {
  const words = Math.round((tokens * 0.75) / 10) * 10;
  return `${tokens.toLocaleString("en")} tokens, about ${words.toLocaleString("en")} words`;
}
