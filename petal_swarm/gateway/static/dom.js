// Making elements. Text is always set as text: nothing that a model, a visitor or a peer wrote is ever HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `class`, `text` and `on` ({event: handler}) are special; other properties are attributes, left
    out if null or false. Children are nodes or strings. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [type, handler] of Object.entries(value)) node.addEventListener(type, handler);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `/static/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon, and words for it: beside it, or (`bare`) for those who listen or hover. */
export function button(name, label, onClick, { bare = false, kind = "quiet" } = {}) {
  const properties = { type: "button", class: bare ? `${kind} only-icon` : kind, on: { click: onClick } };
  if (bare) Object.assign(properties, { "aria-label": label, title: label });
  return el("button", properties, icon(name), ...(bare ? [] : [el("span", { text: label })]));
}

/** A button that copies what `read()` returns, and says so for a moment. */
export function copyButton(label, read, options = {}) {
  const copy = async () => {
    const done = await copyText(read());
    node.querySelector("use").setAttribute("href", `/static/icons.svg#${done ? "check" : "alert"}`);
    announce(done ? "Copied" : "Could not copy");
    setTimeout(() => node.querySelector("use").setAttribute("href", "/static/icons.svg#copy"), 1600);
  };
  const node = button("copy", label, copy, options);
  return node;
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // pages without TLS have no clipboard
  }
}

function copyBySelection(text) {
  const area = el("textarea", { class: "unseen", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  try {
    return document.execCommand("copy");
  } catch {
    return false;
  } finally {
    area.remove();
  }
}

/** Tell those who listen. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}
