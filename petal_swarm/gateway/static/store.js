// Conversations and settings, kept in this browser alone; in memory where it keeps nothing.

const PREFIX = "petal-swarm.";
const CONVERSATION = `${PREFIX}conversation.`;
const SETTINGS = `${PREFIX}settings`;
const MAX_CONVERSATIONS = 100;
const MAX_TURNS = 400;

export const DEFAULT_SETTINGS = Object.freeze({ model: null, temperature: null, maxTokens: 512, system: "", key: "" });

export class Store {
  /** `onChange` is called when another tab has changed something. */
  constructor(onChange) {
    this.conversations = new Map();
    for (const name of names()) if (name.startsWith(CONVERSATION)) this.#read(name);
    this.settings = { ...DEFAULT_SETTINGS, ...object(read(SETTINGS)) };
    window.addEventListener("storage", ({ key }) => {
      if (key === SETTINGS) this.settings = { ...DEFAULT_SETTINGS, ...object(read(SETTINGS)) };
      else if (key?.startsWith(CONVERSATION)) this.#read(key);
      else if (key !== null) return;
      else this.conversations.clear();
      onChange();
    });
  }

  /** Newest first. */
  list() {
    return [...this.conversations.values()].sort((one, other) => other.updated - one.updated);
  }

  create(task, options) {
    const id = Array.from(crypto.getRandomValues(new Uint32Array(3)), (word) => word.toString(36)).join("");
    return { id, task, options: { ...options }, title: "", updated: Date.now(), turns: [] };
  }

  /** Keep it; the oldest others go when there are too many, or no room is left. */
  save(conversation) {
    conversation.turns.splice(0, Math.max(0, conversation.turns.length - MAX_TURNS));
    this.conversations.set(conversation.id, conversation);
    const others = this.list().filter(({ id }) => id !== conversation.id);
    while (others.length >= MAX_CONVERSATIONS) this.remove(others.pop().id);
    const text = JSON.stringify(conversation);
    while (!write(CONVERSATION + conversation.id, text) && others.length) this.remove(others.pop().id);
  }

  remove(id) {
    this.conversations.delete(id);
    erase(CONVERSATION + id);
  }

  saveSettings(changes) {
    Object.assign(this.settings, changes);
    write(SETTINGS, JSON.stringify(this.settings));
  }

  #read(name) {
    const id = name.slice(CONVERSATION.length);
    const conversation = conversationFrom(id, read(name));
    if (conversation) this.conversations.set(id, conversation);
    else this.conversations.delete(id);
  }
}

/** What was stored, if it is what we store: an older page, or somebody's hands, may have written it. */
function conversationFrom(id, stored) {
  const { task, options, title, updated, turns } = object(stored);
  if (typeof task !== "string" || !Array.isArray(turns)) return null;
  const roles = ["user", "assistant"];
  const sound = turns.filter((turn) => typeof turn?.text === "string" && roles.includes(turn.role));
  for (const turn of sound) {
    turn.options = object(turn.options);
    turn.route = isRoute(turn.route) ? turn.route : null;
    if (turn.state === "asked") turn.state = "left"; // the page was left while it was answered
  }
  return { id, task, options: object(options), title: String(title ?? ""), updated: Number(updated) || 0, turns: sound };
}

function isRoute(route) {
  return Array.isArray(route?.hops) && route.hops.every((hop) => typeof hop?.peer === "string" && Array.isArray(hop.blocks));
}

function object(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value) ? value : {};
}

// Browsers that block storage throw on any access to it.

function names() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function write(name, text) {
  try {
    localStorage.setItem(name, text);
    return true;
  } catch (error) {
    return error.name !== "QuotaExceededError"; // others do not go away by making room
  }
}

function erase(name) {
  try {
    localStorage.removeItem(name);
  } catch {
    // Then nothing is kept there either.
  }
}
