// The gateway's HTTP API, as the page uses it.

import { eventData } from "./sse.js";

/** What went wrong with a request. `status` is 0 if no answer came at all. */
export class ApiError extends Error {
  constructor(status, error = {}, retryAfterS = null) {
    super(typeof error.message === "string" ? error.message.slice(0, 2000) : "");
    this.status = status;
    this.type = error.type ?? null;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.retryAfterS = retryAfterS;
  }
}

export async function fetchJson(path) {
  const response = await reach(path, { headers: { Accept: "application/json" } });
  if (!response.ok) throw await apiError(response);
  return response.json();
}

/** Why the swarm cannot answer now, or null if it can. */
export async function fetchTrouble() {
  const response = await reach("/health");
  if (response.ok) return null;
  const content = await response.json().catch(() => ({}));
  return typeof content.reason === "string" ? content.reason : "The swarm cannot answer just now.";
}

/** Yields {text}, {swarm} and {finish} as they come.
    Raises ApiError; AbortError if `signal` was. */
export async function* ask({ path, body }, { key, signal }) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { include_usage: true, include_swarm: true };
  const response = await reach(path, {
    method: "POST",
    headers,
    body: JSON.stringify({ ...body, stream: true, stream_options: options }),
    signal,
  });
  if (!response.ok) throw await apiError(response);
  let done = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") {
        done = true;
        break;
      }
      yield* parts(parse(data));
    }
  } catch (error) {
    throw error instanceof ApiError || error.name === "AbortError" ? error : new ApiError(0, { code: "cut" });
  }
  if (!done) throw new ApiError(0, { code: "cut" });
}

function* parts(chunk) {
  if (chunk.error) throw new ApiError(Number(chunk.error.status) || 500, chunk.error, chunk.error.retry_after_s ?? null);
  if (chunk.swarm) yield { swarm: chunk.swarm };
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const text = choice.delta ? choice.delta.content : choice.text;
  if (text) yield { text };
  if (choice.finish_reason) yield { finish: choice.finish_reason };
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError(500, { message: "The gateway sent something that is not JSON." });
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(0, { code: "unreachable" });
  }
}

async function apiError(response) {
  const wait = Number.parseFloat(response.headers.get("Retry-After"));
  let content = {};
  try {
    content = await response.json();
  } catch {
    // A proxy in between answers in HTML: the status says enough.
  }
  const error = content?.error ?? content ?? {};
  const told = typeof error === "object" ? error : { message: String(error) };
  return new ApiError(response.status, told, Number.isFinite(wait) ? wait : null);
}
