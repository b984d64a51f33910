// The stream of the swarm: what comes in is handed on, and a lost connection is made again.

// The gateway sends a beat every 10 s in which nothing happens.
const SILENT_MS = 25000;
const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 15000;

/**
 * Read `/api/swarm/events` for ever. `onDocument(kind, document)` gets each "swarm" and "change";
 * `onLink(isLive)` is called whenever the connection comes or goes.
 */
export function readSwarm({ url = "/api/swarm/events", onDocument, onLink }) {
  let source = null;
  let pauseMs = FIRST_PAUSE_MS;
  let watchdog = 0;
  let again = 0;

  function connect() {
    clearTimeout(again);
    source = new EventSource(url);
    const of = source;
    for (const kind of ["swarm", "change", "beat"]) {
      source.addEventListener(kind, (event) => of === source && take(kind, event));
    }
    source.onerror = () => of === source && lose();
    watch();
  }

  function take(kind, event) {
    watch();
    pauseMs = FIRST_PAUSE_MS;
    onLink(true);
    if (kind !== "beat") {
      onDocument(kind, JSON.parse(event.data));
    }
  }

  // A browser that has given up, as after an error status, does not come back by itself.
  function lose() {
    onLink(false);
    source.close();
    source = null;
    clearTimeout(watchdog);
    clearTimeout(again);
    again = setTimeout(connect, pauseMs * (0.75 + Math.random() / 2));
    pauseMs = Math.min(LONGEST_PAUSE_MS, 2 * pauseMs);
  }

  function watch() {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => source && lose(), SILENT_MS);
  }

  addEventListener("online", () => source === null && connect());
  connect();
}
