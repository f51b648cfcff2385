// The three ways to read a stream in a browser. Each reports to its lane what happens. It ends when
// the stream ends, when it cannot go on (StreamError), or when `stop`, an AbortSignal, is aborted.

import { StreamError } from "./lane.js";
import { cut, decodeLine, lines, messages, NotAnEvent, parseEvent } from "./wire.js";

const FIRST_DELAY = 0.2; // seconds before a stream is resumed; each further attempt waits longer
const GIVE_UP_AFTER = 30; // seconds without a new event
const STALL_TIMEOUT = 15; // seconds without a byte; the server is never silent for more than 10
const MAX_PIECES = 16; // of one chunk that are shown
const NO_IDS = "Plain text has no ids to resume by.";

/** This connection failed; another attempt may succeed. */
class ConnectionLost extends Error {}

/** Nobody listens. At the start, this is reported at once; later, the server may come back. */
class CannotConnect extends ConnectionLost {}

/** The server refused the request: `problems` says which parameter is wrong, and why. */
export class Refused extends StreamError {
  constructor(status, problems) {
    super(`the server answered ${status}.`);
    this.problems = problems;
  }
}

/** Plain text: it cannot tell an end from a cut, and cannot be resumed. */
export async function readText(url, lane, stop) {
  const connection = new Connection(stop);
  lane.cut = () => connection.abort("you cut the connection");
  let pieces = 0;
  const show = (chunk) => {
    const count = Math.ceil(chunk.length / 16);
    lane.show("chunk", {
      first: pieces,
      pieces: cut(chunk.subarray(0, MAX_PIECES * 16)),
      left: Math.max(0, count - MAX_PIECES),
    });
    pieces += count;
  };
  try {
    const body = await connection.open(url, lane);
    const shown = body.pipeThrough(tap(show));
    for await (const line of items(shown.pipeThrough(lines()))) {
      const data = decodeLine(line);
      if (data === null) continue; // cut off in the middle
      // Plain text has no event ids, and does not mark the last line.
      const event_id = lane.count;
      const is_last_event = event_id === lane.steps - 1;
      lane.take({ event_id, data, is_last_event });
    }
  } catch (error) {
    if (!(error instanceof ConnectionLost) || stop.aborted) throw error;
    if (error instanceof CannotConnect) throw new StreamError(`${error.message}.`);
    throw new StreamError(`${error.message}. ${NO_IDS}`);
  } finally {
    connection.close();
  }
  if (lane.count < lane.steps) {
    throw new StreamError(`the stream ended early. ${NO_IDS}`);
  }
  lane.done("The body ended.");
}

/** NDJSON: each line is an event with its id, and says whether it is the last. */
export async function readNdjson(url, lane, stop) {
  await readResuming(url, lane, stop, async function* (body) {
    for await (const line of items(body.pipeThrough(lines()))) {
      const text = decodeLine(line);
      // Null: the line was cut off. It is sent again after resuming.
      if (text?.trim()) yield { event: parseEvent(text), text };
    }
  });
}

/** Server-sent events: the browser reads, reconnects and resumes by itself, until it gets a 204. */
export async function readSse(url, lane, stop) {
  const source = new EventSource(url);
  const path = pathOf(url);
  const end = await new Promise((resolve) => {
    source.onopen = () => {
      lane.requested(path);
      lane.opened();
    };
    source.onmessage = ({ data, lastEventId }) => {
      try {
        if (lane.take(parseEvent(data))) lane.show("event", { text: fields(lastEventId, data) });
      } catch (error) {
        resolve(error);
      }
    };
    source.onerror = () => {
      if (source.readyState === EventSource.CONNECTING) {
        lane.lost("the connection ended, and EventSource reconnects");
      } else if (lane.complete) {
        lane.requested(path);
        resolve("204");
      } else {
        // EventSource says no more. The answer was not a stream: perhaps a 422 or a 502.
        resolve(new StreamError("EventSource gave up. It does not say which answer it got."));
      }
    };
    lane.cut = () => resolve("cut");
    stop.addEventListener("abort", () => resolve(stop.reason), { once: true });
  });
  source.close();
  if (end instanceof Error) throw end;
  if (end === "204") lane.done("EventSource reconnected, and the 204 ended it.");
  else await goOnWithFetch(url, lane, stop);
}

/**
 * A page can close an EventSource, but not cut it, and a new one cannot start after a given event
 * (https://github.com/whatwg/html/issues/2177). So fetch reads the rest as an EventSource would:
 * the same request, again and again until the 204.
 */
async function goOnWithFetch(url, lane, stop) {
  lane.lost("you cut EventSource off, so fetch reads the rest");
  const untilNoContent = true;
  await readResuming(url, lane, stop, sseEvents, { untilNoContent });

  async function* sseEvents(body) {
    for await (const { data, lastEventId } of items(
      body.pipeThrough(lines()).pipeThrough(messages()),
    )) {
      yield { event: parseEvent(data), text: fields(lastEventId, data) };
    }
  }
}

/**
 * Read a stream of events to its end, over as many connections as it takes. Each new request sends
 * the `Last-Event-ID`. The first pause is 0.2 seconds; each further one is 1.5 times as long.
 */
async function readResuming(url, lane, stop, toEvents, { untilNoContent = false } = {}) {
  let delay = FIRST_DELAY;
  let deadline = lane.seconds() + GIVE_UP_AFTER;
  let everConnected = lane.count > 0;
  if (everConnected) await sleep(delay, stop);
  for (;;) {
    const connection = new Connection(stop);
    lane.cut = () => connection.abort("you cut the connection");
    try {
      const body = await connection.open(url, lane);
      if (body === null) return lane.done("The 204 says that nothing is left.");
      everConnected = true;
      for await (const { event, text } of toEvents(body)) {
        if (!lane.take(event)) continue;
        lane.show("event", { text });
        if (event.is_last_event && !untilNoContent)
          return lane.done("The last event says that it is the last.");
        deadline = lane.seconds() + GIVE_UP_AFTER;
        delay = FIRST_DELAY;
      }
      throw new ConnectionLost("the server ended it early");
    } catch (error) {
      if (!(error instanceof ConnectionLost) || stop.aborted) throw error;
      if (error instanceof CannotConnect && !everConnected)
        throw new StreamError(`${error.message}.`);
      everConnected = true;
      const remaining = deadline - lane.seconds();
      if (remaining <= 0) {
        throw new StreamError(`no event for ${GIVE_UP_AFTER} seconds (${error.message}).`);
      }
      lane.lost(error.message);
      // Slightly random: otherwise all readers of a server would reconnect at the same moment.
      await sleep(Math.min(delay * (0.9 + 0.2 * Math.random()), remaining), stop);
      delay *= 1.5;
    } finally {
      connection.close();
    }
  }
}

/** A request and its answer, until the end, a cut, `stop`, or 15 seconds without a byte. */
class Connection {
  #controller = new AbortController();
  #timer = null;

  constructor(stop) {
    this.signal = AbortSignal.any([stop, this.#controller.signal]);
  }

  abort(why) {
    this.#controller.abort(new ConnectionLost(why));
  }

  close() {
    clearTimeout(this.#timer);
    this.#controller.abort();
  }

  #alive() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(
      () => this.abort(`nothing came for ${STALL_TIMEOUT} seconds`),
      STALL_TIMEOUT * 1000,
    );
  }

  /** Send the request; return the body of the answer, or null if the server has nothing left. */
  async open(url, lane) {
    const resuming = lane.lastEventId !== null;
    const headers = resuming ? { "Last-Event-ID": String(lane.lastEventId) } : {};
    lane.requested(pathOf(url));
    this.#alive();
    let response;
    try {
      const options = { headers, signal: this.signal, cache: "no-store" };
      response = await fetch(url, options);
    } catch {
      throw this.signal.aborted ? this.signal.reason : new CannotConnect("nobody listens there");
    }
    const status = `${response.status} ${response.statusText}`.trim();
    if (response.status === 204) return null;
    if (response.status >= 500) throw new ConnectionLost(`the server answered ${status}`);
    if (response.status !== 200) throw new Refused(status, await problemsOf(response));
    lane.opened();
    return this.#watch(response.body);
  }

  /** Pass on the bytes. Each chunk restarts the stall timer; a broken body is a ConnectionLost. */
  #watch(body) {
    const reader = body.getReader();
    return new ReadableStream({
      pull: async (controller) => {
        try {
          const { done, value } = await reader.read();
          this.#alive();
          if (done) controller.close();
          else controller.enqueue(value);
        } catch {
          const { aborted, reason } = this.signal;
          controller.error(aborted ? reason : new ConnectionLost("the connection was cut"));
        }
      },
      cancel: (reason) => reader.cancel(reason),
    });
  }
}

/** FastAPI's detail of a 422: [{ loc: ["query", "steps"], msg: "Input should be …" }]. */
async function problemsOf(response) {
  try {
    const { detail } = await response.json();
    return Array.isArray(detail) ? detail : [];
  } catch {
    return [];
  }
}

/** The items of a stream. (Safari has had `for await` over a stream itself only since 2026.) */
async function* items(stream) {
  const reader = stream.getReader();
  try {
    for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {}); // it has failed already, or nobody reads it any more
  }
}

/** A transform that changes nothing, and calls `tell` with each chunk. */
function tap(tell) {
  return new TransformStream({
    transform(chunk, controller) {
      tell(chunk);
      controller.enqueue(chunk);
    },
  });
}

function sleep(seconds, stop) {
  return new Promise((resolve, reject) => {
    stop.addEventListener("abort", () => reject(stop.reason), { once: true });
    setTimeout(resolve, seconds * 1000);
  });
}

const pathOf = (url) => {
  const { pathname, search } = new URL(url, location.href);
  return pathname + search;
};

/** The fields of an event, as they were sent; EventSource keeps `retry` to itself. */
const fields = (id, data) => `id: ${id}\ndata: ${data.replaceAll("\n", "\ndata: ")}`;
