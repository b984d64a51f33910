// What happened, in words.

/** {title, text, action} of an error; `action` is what the page offers besides trying again: "settings",
    "shorten", "swarm" or null. `waitS` is when trying again makes sense. */
export function explain(error) {
  const { status, code, message } = error;
  const said = message ? sentence(message) : "";
  if (code === "unreachable")
    return told("The gateway does not answer", "It may have stopped, or your connection is gone. What you wrote is kept.");
  if (code === "cut")
    return told("The answer broke off", "The connection to the gateway was lost on the way. What had come so far is kept.");
  if (code === "context_length_exceeded")
    return told("This is more than the model can read at once", said, { action: "shorten" });
  if (status === 401)
    return told("This gateway asks for a key", "Put the key that its operator gave you into the settings.", { action: "settings" });
  if (status === 404) return told("This model is not here any more", said || "Choose another one.", { action: "settings" });
  if (status === 413) return told("That is too long", said || "The gateway takes no texts of this size. Shorten it.");
  if (code === "rate_limit_exceeded")
    return told("You have asked often in this minute", waited(error, said), { waitS: error.retryAfterS });
  if (status === 429) return told("Many people are asking just now", busy(error), { waitS: error.retryAfterS });
  if (status === 503)
    return told("The swarm cannot answer right now", ranges(said) || "A part of the model has nobody to run it.", {
      action: "swarm",
      waitS: error.retryAfterS,
    });
  if (status === 504) return told("That took too long", said || "The swarm did not answer in time.", { action: "swarm" });
  if (status >= 400 && status < 500) return told("The gateway did not take this", said || `It answered with status ${status}.`);
  return told("Something went wrong at the gateway", said || "This is not your fault. Try again in a moment.");
}

function told(title, text, { action = null, waitS = null } = {}) {
  return { title, text, action, waitS };
}

function busy({ retryAfterS, message }) {
  if (retryAfterS) return `There should be room in ${duration(retryAfterS)}. What you wrote is kept.`;
  return message ? sentence(message) : "Try again in a moment. What you wrote is kept.";
}

function waited({ retryAfterS }, said) {
  const again = retryAfterS ? `You can ask again in ${duration(retryAfterS)}.` : "";
  return [said, again, "What you wrote is kept."].filter(Boolean).join(" ");
}

/** Blocks are "15–29" on the pages, and "15-29" where the keyboard has to do. */
export const ranges = (text) => text.replace(/(\d)-(\d)/g, "$1–$2");

function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?)]$/.test(trimmed) ? "" : ".");
}

/** "You are 3rd of 12 in line, about 8 seconds". */
export function place({ place: number, of, expected_s: expectedS }) {
  const ahead = number > 1 ? `${ordinal(number)}${of ? ` of ${of}` : ""} in line` : "next in line";
  return `You are ${ahead}${Number.isFinite(expectedS) && expectedS > 0 ? `, about ${duration(expectedS)}` : ""}`;
}

function ordinal(number) {
  const teens = number % 100 > 10 && number % 100 < 14;
  return `${number}${teens ? "th" : ({ 1: "st", 2: "nd", 3: "rd" }[number % 10] ?? "th")}`;
}

export function duration(seconds) {
  const whole = Math.max(1, Math.ceil(seconds));
  if (whole < 90) return whole === 1 ? "1 second" : `${whole} seconds`;
  return `${Math.round(whole / 60)} minutes`;
}

/** "0.42 s", "84 ms". */
export function short(seconds) {
  if (seconds < 0.0995) return milliseconds(seconds * 1000);
  return `${seconds < 9.95 ? seconds.toFixed(seconds < 0.995 ? 2 : 1) : Math.round(seconds)} s`;
}

export function milliseconds(value) {
  return `${value < 9.95 ? value.toFixed(1) : Math.round(value)} ms`;
}

export function rate(perSecond) {
  return `${perSecond < 9.95 ? perSecond.toFixed(1) : Math.round(perSecond)} tokens/s`;
}

/** "just now", "5 min ago", "yesterday", a date. */
export function ago(time, now = Date.now()) {
  const minutes = Math.floor((now - time) / 60000);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${minutes} min ago`;
  if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h ago`;
  if (minutes < 48 * 60) return "yesterday";
  return new Date(time).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}
