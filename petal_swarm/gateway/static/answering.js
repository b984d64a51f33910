// Having a turn answered: the stream goes into the turn, which is what is shown and kept.

import { ask } from "./api.js";
import { routeFrom } from "./route.js";
import { explain } from "./words.js";

const SAVE_EVERY_MS = 1000;

/** Answers of this page that are under way, one at most for each conversation. */
export class Answering {
  /** `onChange(conversation, turn)` after each change of a turn; `save(conversation)` now and then. */
  constructor({ onChange, save }) {
    this.onChange = onChange;
    this.save = save;
    this.running = new Map();
    this.heardAt = -Infinity; // when a part of any answer came last
    this.leaving = false;
    window.addEventListener("pagehide", () => {
      this.leaving = true; // what fails from now on fails because of that
    });
    window.addEventListener("pageshow", () => {
      this.leaving = false;
    });
  }

  isRunning(conversation) {
    return this.running.has(conversation.id);
  }

  stop(conversation) {
    this.running.get(conversation.id)?.abort();
  }

  /** Put `request` to the gateway. The answer goes into `turn`, whose state becomes asked, then one of done,
      stopped, failed. */
  async answer(conversation, turn, request, key) {
    const aborter = new AbortController();
    this.running.set(conversation.id, aborter);
    const fresh = { text: "", state: "asked", stage: { state: "opening" }, error: null, route: null, finish: null };
    Object.assign(turn, fresh);
    this.save(conversation);
    this.onChange(conversation, turn);
    try {
      await this.#ask(conversation, turn, request, { key, signal: aborter.signal });
      turn.state = "done";
    } catch (error) {
      turn.state = aborter.signal.aborted ? "stopped" : this.leaving ? "left" : "failed";
      if (turn.state === "failed") {
        turn.error = explain(error);
        this.heardAt = -Infinity;
      }
    }
    turn.stage = null;
    this.running.delete(conversation.id);
    conversation.updated = Date.now();
    this.save(conversation);
    this.onChange(conversation, turn);
  }

  /** Where the longest answer that was asked for has no room any more, a shorter one may have. */
  async #ask(conversation, turn, request, options) {
    try {
      await this.#read(conversation, turn, ask(request, options));
    } catch (error) {
      const isChat = Boolean(request.body.messages); // texts without a length are continued by a few words only
      if (error.code !== "context_length_exceeded" || turn.text || !isChat) throw error;
      const { max_tokens: _, ...body } = request.body;
      await this.#read(conversation, turn, ask({ ...request, body }, options));
    }
  }

  async #read(conversation, turn, parts) {
    let savedAt = performance.now();
    for await (const part of parts) {
      if (part.text) {
        turn.text += part.text;
        this.heardAt = performance.now();
      }
      if (part.finish) turn.finish = part.finish;
      if (part.swarm) {
        turn.stage = part.swarm;
        if (part.swarm.route) turn.route = routeFrom(part.swarm);
      }
      this.onChange(conversation, turn);
      if (performance.now() - savedAt > SAVE_EVERY_MS) {
        savedAt = performance.now();
        this.save(conversation);
      }
    }
  }
}
