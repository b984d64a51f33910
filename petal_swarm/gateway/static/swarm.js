// The page of the swarm: state from the stream, and everything around the map.

import { SwarmMap } from "./swarm-map.js";
import { readSwarm } from "./swarm-stream.js";
import { factsOf, listOfRuns, lookOf, nameOf, signOf, stateOf } from "./swarm-words.js";
import { ranges } from "./words.js";

const MAX_FEED = 100;
const at = (id) => document.getElementById(id);
const state = { document: null, peers: new Map(), newest: 0, isLive: null, seenAt: null };

const map = new SwarmMap(
  Object.fromEntries(["sheet", "axis", "copies", "lanes", "lines", "gaps", "servers"].map((id) => [id, at(id)])),
  showCard,
);

function take(kind, document) {
  if (kind === "swarm") {
    if (state.document?.watch !== document.watch) state.newest = 0; // the gateway has started anew
    state.document = document;
    state.peers = new Map(document.peers.map((peer) => [peer.id, peer]));
  } else {
    Object.assign(state.document, document, { peers: undefined, events: undefined });
    for (const id of document.gone) state.peers.delete(id);
    for (const peer of document.peers) state.peers.set(peer.id, peer);
  }
  state.seenAt = new Date();
  const news = document.events.filter((event) => event.number > state.newest);
  if (news.length) state.newest = news.at(-1).number;
  tell(news, kind === "change");
  show(new Map(news.map((event) => [event.id, event.kind])));
}

function show(kinds) {
  const { document, peers } = state;
  const missing = document.missing_blocks;
  at("model").textContent = document.model;
  at("map").hidden = false;
  const verdict = at("verdict");
  const isWhole = missing.length === 0 && document.is_reachable;
  verdict.classList.toggle("bad", !isWhole);
  verdict.textContent = verdictOf(document, missing, peers.size);
  showFigures();
  map.draw(document.num_blocks, peers.values(), missing, kinds);
  showEmpty();
  showViews();
  showNotes();
}

function verdictOf(document, missing, count) {
  if (!document.is_reachable) return "The swarm cannot be reached.";
  if (count === 0) return "Nobody is here yet.";
  if (missing.length === document.num_blocks) return "No block is served: the model cannot answer now.";
  if (missing.length === 0) return "Every block is served: the model answers.";
  return `${listOfRuns(missing)} ${missing.length === 1 ? "is" : "are"} served by nobody: the model cannot answer until somebody does.`;
}

function showFigures() {
  const { document, peers } = state;
  const count = (test) => [...peers.values()].filter(test).length;
  const figures = [
    ["blocks", document.num_blocks],
    [peers.size === 1 ? "server" : "servers", peers.size],
  ];
  for (const [look, word] of [["busy", "busy"], ["joining", "not ready"], ["silent", "silent"]]) {
    const found = count((peer) => lookOf(peer) === look);
    if (found) figures.push([word, found]);
  }
  at("figures").replaceChildren(
    ...figures.map(([word, number]) => make("div", {}, make("dt", {}, word), make("dd", {}, String(number)))),
  );
}

function showEmpty() {
  const isEmpty = state.peers.size === 0;
  let empty = at("sheet").querySelector(".empty");
  if (isEmpty && !empty) {
    empty = make(
      "div",
      { className: "empty" },
      make("p", {}, "Be the first to serve some blocks:"),
      make("code", {}, `petal-swarm run-server ${state.document.model} --initial-peers ADDR`),
    );
    at("sheet").append(empty);
  } else if (!isEmpty) {
    empty?.remove();
  }
  at("lanes").hidden = isEmpty;
}

function showViews() {
  const isPacked = map.isPacked;
  for (const button of document.querySelectorAll("[data-view]")) {
    button.setAttribute("aria-pressed", String((button.dataset.view === "packed") === isPacked));
  }
}

function showNotes() {
  const notes = [];
  if (state.isLive === false) {
    const since = state.seenAt ? ` What you see is from ${time(state.seenAt)}.` : "";
    notes.push(make("p", { className: "note warn" }, `The connection to this gateway is lost; trying again.${since}`));
  } else if (state.document && !state.document.is_reachable) {
    notes.push(make("p", { className: "note bad" }, "This gateway cannot reach the swarm: no server that it knows answers. It goes on trying."));
  }
  const words = notes.map((note) => note.textContent).join();
  if (at("notes").textContent !== words) at("notes").replaceChildren(...notes);
  at("sheet").classList.toggle("stale", state.isLive === false || state.document?.is_reachable === false);
}

function setLink(isLive) {
  if (state.isLive === isLive) return;
  state.isLive = isLive;
  const [dot, words] = at("link").children;
  dot.className = `dot ${isLive ? "good" : "warn"}`;
  words.textContent = isLive ? "live" : "connection lost";
  showNotes();
}

function tell(events, isNew) {
  const feed = at("feed");
  for (const event of events) {
    const [sign, tone] = signOf(event.kind);
    const words = make("p", {});
    const told = ranges(event.words);
    if (event.id) {
      words.append(make("b", {}, make("bdi", {}, nameOf(event))), ` ${told}`);
    } else {
      words.append(told.charAt(0).toUpperCase() + told.slice(1));
    }
    const date = new Date(1000 * event.at);
    words.append(make("time", { dateTime: date.toISOString() }, time(date)));
    feed.prepend(
      make("li", { className: isNew ? "new" : "" }, make("span", { className: `sign ${tone}`, ariaHidden: "true" }, sign), words),
    );
  }
  while (feed.children.length > MAX_FEED) feed.lastChild.remove();
  at("feed-empty").hidden = feed.children.length > 0;
}

function showCard(peer, bar) {
  const card = at("card");
  card.hidden = peer === null;
  if (peer === null) return;
  const tone = { serving: "good", busy: "warn", joining: "", silent: "bad" }[lookOf(peer)];
  const facts = factsOf(peer).flatMap(([what, much]) => [make("dt", {}, what), make("dd", {}, make("bdi", {}, much))]);
  card.replaceChildren(
    make("h3", {}, make("bdi", {}, nameOf(peer)), " ", make("small", {}, peer.name ? `..${peer.id}` : "")),
    make("p", {}, make("span", { className: `dot ${tone}` }), stateOf(peer)),
    make("dl", {}, ...facts),
  );
  const box = bar.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = card;
  const left = Math.min(Math.max(12, box.left), innerWidth - width - 12);
  const below = box.bottom + 8;
  card.style.left = `${left}px`;
  card.style.top = `${below + height < innerHeight ? below : Math.max(8, box.top - height - 8)}px`;
}

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const time = (date) => date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => {
    map.choose(button.dataset.view);
    showViews();
  });
}
document.addEventListener("keydown", (event) => event.key === "Escape" && showCard(null, null));
readSwarm({ onDocument: take, onLink: setLink });
