// What a lane knows of its stream: its state, its arrivals and how late they were. No DOM here.

export const MAX_MARKS = 250; // drawn in a lane, however many events there were
export const MAX_ROWS = 60; // shown in a lane: the latest
const ON_TIME = 0.1; // seconds; nobody sees a smaller delay

/** Why no more events can arrive, in one sentence for the person who looks at the lane. */
export class StreamError extends Error {}

/**
 * One stream, from its start to its end. Readers tell it what happens; the page draws it.
 *
 * `seconds` returns the time since the start, on the clock that all lanes share.
 */
export class Lane {
  state = "idle"; // open, resuming, done, failed
  words = "Connecting …";
  count = 0;
  resumed = 0;
  lastEventId = null;
  latest = null; // the latest event: { id, text, at, connection }
  first = null;
  complete = false; // the last event is here
  lossSeen = false;
  ended = null; // when it was over, in seconds
  marks = new Thinned(MAX_MARKS);
  connections = []; // [{ from, to, origin }]
  revised = 0; // how often an origin, and so all lateness, was revised
  rows = new Tail(MAX_ROWS); // what was on the wire

  constructor({ stream, steps, interval, seconds }) {
    this.stream = stream;
    this.steps = steps;
    this.interval = interval;
    this.seconds = seconds;
  }

  /** A request was sent: `GET /ndjson?…`, with `Last-Event-ID` if it resumes. */
  requested(path) {
    const header = this.lastEventId === null ? "" : `\nLast-Event-ID: ${this.lastEventId}`;
    this.show("request", { text: `GET ${path}${header}` });
  }

  /** What was on the wire: a row of a kind (request, chunk, event, note), and what is in it. */
  show(kind, what) {
    this.rows.add({ kind, at: this.seconds(), ...what });
  }

  /** The answer has begun, and it is a stream. */
  opened() {
    this.state = "open";
    const again = this.connections.length > 0;
    if (again) this.resumed += 1;
    this.words = again ? `Open: resumed ${this.#where()}.` : "Open.";
    this.connections.push({ from: this.seconds(), to: null, origin: Infinity });
  }

  /**
   * Take an event; return whether it was new. The lane may have it already.
   * Throws StreamError if events before it are missing.
   */
  take({ event_id: id, data, is_last_event: isLast }) {
    const expected = this.lastEventId === null ? 0 : this.lastEventId + 1;
    if (id > expected) {
      throw new StreamError(`event ${id} came where event ${expected} was due: events are lost.`);
    }
    if (id < expected) return false;
    const at = this.seconds();
    const connection = this.connections.at(-1);
    // The server sends event k when k × interval have passed, never earlier. So the event that took
    // the least time to arrive shows when the server's clock began; each request has its own.
    const origin = at - id * this.interval;
    if (origin < connection.origin) {
      connection.origin = origin;
      this.revised += 1;
    }
    this.latest = { id, text: data, at, connection };
    this.first ??= this.latest;
    this.lastEventId = id;
    this.count += 1;
    this.complete = isLast;
    this.marks.add(this.latest);
    return true;
  }

  /** How many seconds after its time an event came; null if the interval is 0. */
  late({ id, at, connection }) {
    return this.interval ? at - id * this.interval - connection.origin : null;
  }

  /** The connection is gone; another one may bring the rest. */
  lost(why) {
    this.#close();
    if (this.complete) {
      // Only EventSource reports an end as a loss: it reconnects until it gets a 204.
      this.words = "All events are here. EventSource reconnects until a 204 ends it.";
      return;
    }
    if (this.state === "resuming") return;
    this.lossSeen = true;
    this.state = "resuming";
    this.words = `Resuming ${this.#where()}: ${why}.`;
    this.show("note", { text: why });
  }

  done(how) {
    const held = "All at once, at the end: held back on the way";
    this.#over("done", `${this.heldBack ? held : "Done"}. ${how}`);
    this.show("note", { text: how });
  }

  failed(why) {
    const text = `Failed ${this.#where()}: ${why}`;
    this.#over("failed", text);
    this.show("note", { text });
  }

  stopped() {
    if (this.ended === null) this.#over("idle", `Stopped ${this.#where()}.`);
  }

  /** Everything came at the end, although the stream took over a second (as in client.py). */
  get heldBack() {
    const took = this.latest?.at ?? 0;
    return this.count > 1 && !this.lossSeen && took > 1 && this.first.at > 0.9 * took;
  }

  /** The name of an arrival. Plain text has no ids, so its lines are counted from 1. */
  name({ id }) {
    return this.stream === "text" ? `line ${id + 1}` : `event ${id}`;
  }

  #where() {
    return this.latest ? `after ${this.name(this.latest)}` : "at the start";
  }

  #close() {
    const connection = this.connections.at(-1);
    if (connection) connection.to ??= this.seconds();
  }

  #over(state, words) {
    this.#close();
    this.state = state;
    this.words = words;
    this.ended = this.seconds();
  }
}

/** At most `max` items with an `id`, evenly spread over all: each, then each 2nd, 4th, 8th … */
export class Thinned {
  stride = 1;
  items = [];

  constructor(max) {
    this.max = max;
  }

  add(item) {
    if (item.id % this.stride) return;
    this.items.push(item);
    while (this.items.length > this.max) {
      this.stride *= 2;
      this.items = this.items.filter(({ id }) => id % this.stride === 0);
    }
  }
}

/** The latest `max` items, each with a number of its own. */
export class Tail {
  items = [];
  count = 0;

  constructor(max) {
    this.max = max;
  }

  add(item) {
    this.items.push({ ...item, number: this.count });
    this.count += 1;
    // Not with each item: moving the rest of an array costs time.
    if (this.items.length >= 2 * this.max) this.items = this.latest;
  }

  get latest() {
    return this.items.slice(-this.max);
  }
}

/**
 * The end of the time axis, in seconds: a little after the stream's own end, if that is near. If a
 * stream takes longer, the axis grows in steps, so that the marks stand still in between.
 */
export function axisEnd(duration, elapsed) {
  let end = Math.max(1, 1.15 * Math.min(duration || 0, 30));
  while (end < elapsed) end *= 1.5;
  return end;
}

/** The labels, in seconds, of an axis that ends at `end`: at most `max`, at round distances. */
export function ticks(end, max) {
  const power = 10 ** Math.floor(Math.log10(end / max));
  const step = [1, 2, 5, 10].map((n) => n * power).find((step) => end / step < max);
  return Array.from({ length: Math.floor(end / step) + 1 }, (_, i) =>
    Number((i * step).toPrecision(6)),
  );
}

/** Seconds as a person reads them: 3.004 s. */
export function inSeconds(seconds) {
  return `${seconds.toFixed(3)} s`;
}

/** Whether a delay of so many seconds is worth showing. */
export const isLate = (seconds) => seconds >= ON_TIME;

/** How late, in words: on time, 212 ms late. */
export function lateness(seconds) {
  if (seconds === null) return "no schedule";
  if (!isLate(seconds)) return "on time";
  return `${Math.round(seconds * 1000).toLocaleString("en")} ms late`;
}

/** The spans of a lane's time: [{ kind: "open" | "gap", from, to }], the last up to `now`. */
export function spans({ connections, state, ended }, now) {
  const found = [];
  let end = 0;
  for (const { from, to } of connections) {
    if (found.length) found.push({ kind: "gap", from: end, to: from });
    end = to ?? now;
    found.push({ kind: "open", from, to: end });
  }
  if (state === "resuming") found.push({ kind: "gap", from: end, to: ended ?? now });
  return found;
}
