// What the recipes' pages share: a view of the wire, and a reader of server-sent events.

const LINES = 200; // lines in the view
const WIDTH = 1000; // characters of a line in the view
const LONGEST_PAUSE = 30_000; // ms between two attempts to connect

/** Shows raw text. style.css keeps its end in view. */
export class Wire {
  #code = document.createElement("code");
  #open = ""; // the beginning of a line that has not ended yet

  constructor(element) {
    element.replaceChildren(this.#code);
  }

  /** Show raw text. It may begin and end in the middle of a line. */
  add(text) {
    const lines = (this.#open + text).split("\n").slice(-LINES - 1);
    if (this.#open) this.#code.lastChild.remove(); // it is shown again, with what follows
    this.#open = lines.pop().slice(0, WIDTH + 1);
    for (const line of lines) this.#show(line, "\n");
    if (this.#open) this.#show(this.#open, "");
    while (this.#code.childElementCount > LINES) this.#code.firstChild.remove();
  }

  /** Show a line about the connection, which was not on the wire. */
  note(text) {
    if (this.#open) this.add("\n"); // it was cut off
    this.#show(text, "\n", "note");
  }

  #show(line, end, field = line.match(/^[^: \r]*/)[0] || "comment") {
    const shown = document.createElement("span");
    shown.className = field;
    shown.textContent = (line.length > WIDTH ? `${line.slice(0, WIDTH)}…` : line) + end;
    this.#code.append(shown);
  }
}

/**
 * Reads server-sent events as EventSource does, but can send any request, and says what went wrong.
 *
 * EventSource gives up when an answer is not a stream, such as a proxy's 502 while the server
 * restarts, and you cannot tell a new one where to resume
 * (https://github.com/whatwg/html/issues/2177). This one tries again after the end of a stream, a
 * cut and a 5xx, with Last-Event-ID; a 204 and a 4xx are final.
 *
 * onstate(state, sentence) is called with "connecting", "open", "over" or "failed".
 */
export class Source {
  #url;
  #options;
  #closing = new AbortController();
  #retry = 1000; // ms; the server may name another pause
  #attempts = 0; // since the last event or comment
  lastEventId;

  /** `silence`: ms after which a connection is given up; the recipes send a comment every 10 s. */
  constructor(url, { lastEventId = "", ...options } = {}) {
    this.#url = url;
    this.#options = { onevent() {}, onstate() {}, init: {}, reconnect: true, silence: 25_000 };
    Object.assign(this.#options, options);
    this.lastEventId = lastEventId ?? "";
    queueMicrotask(() => this.#run()); // the caller has this object before the first callback
  }

  /** Stop reading. Nothing is called after this. */
  close() {
    this.#closing.abort();
  }

  async #run() {
    this.#tell("connecting", "Connecting …");
    for (;;) {
      const { state, sentence, again, after = 0 } = await this.#read();
      if (!again || !this.#options.reconnect) return this.#tell(state, sentence);
      const pause = Math.max(this.#retry * 2 ** this.#attempts++, after);
      // Up to twice as long: when a server restarts, its readers must not all come at once.
      const wait = Math.min(pause, LONGEST_PAUSE) * (1 + Math.random());
      this.#tell("connecting", `${sentence} Trying again in ${(wait / 1000).toFixed(1)} s.`);
      await new Promise((resolve) => setTimeout(resolve, wait));
      if (this.#closing.signal.aborted) return undefined;
    }
  }

  /** Read one answer to its end. Return what this end means. */
  async #read() {
    const { wire, init, silence } = this.#options;
    const silent = new AbortController();
    let timer;
    const awake = () => {
      clearTimeout(timer);
      if (silence) timer = setTimeout(() => silent.abort(), silence);
    };
    awake();
    try {
      const headers = new Headers(init.headers);
      if (!headers.has("Accept")) headers.set("Accept", "text/event-stream");
      // A header's value is bytes; the id is sent as UTF-8, as EventSource sends it.
      const id = String.fromCharCode(...new TextEncoder().encode(this.lastEventId));
      if (id) headers.set("Last-Event-ID", id);
      const signal = AbortSignal.any([this.#closing.signal, silent.signal]);
      const request = new Request(this.#url, { cache: "no-store", ...init, headers, signal });
      const { pathname, search } = new URL(request.url);
      wire?.note(`> ${request.method} ${pathname}${search}`);
      if (id) wire?.note(`> Last-Event-ID: ${id}`);
      const response = await fetch(request);
      const type = response.headers.get("Content-Type") ?? "";
      wire?.note(`< ${response.status} ${type}`);
      if (response.status === 204) return { state: "over", sentence: "The stream is over." };
      if (!response.ok) {
        const after = Number(response.headers.get("Retry-After")) * 1000 || 0;
        const sentence = `The server answered ${response.status}${await reasonOf(response)}.`;
        return { state: "failed", sentence, again: response.status >= 500, after };
      }
      if (!type.startsWith("text/event-stream")) {
        return {
          state: "failed",
          sentence: `The answer is not a stream of events, but “${type}”.`,
        };
      }
      this.#tell("open", "Connected.");
      const body = response.body.pipeThrough(new TextDecoderStream()).getReader();
      const parse = this.#parser();
      for (let part = await body.read(); !part.done; part = await body.read()) {
        awake();
        wire?.add(part.value);
        parse(part.value);
      }
      return { state: "over", sentence: "The server ended the stream.", again: true };
    } catch (error) {
      const reason = silent.signal.aborted ? "the server has fallen silent" : error.message;
      return { state: "failed", sentence: `The connection broke off (${reason}).`, again: true };
    } finally {
      clearTimeout(timer);
    }
  }

  /**
   * Return a function that takes the body piece by piece. It drops an event that has no end.
   * https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
   */
  #parser() {
    let rest = "";
    let afterReturn = false;
    let id = this.lastEventId;
    let [type, data] = ["", []];
    const fields = {
      id: (value) => (id = value.includes("\0") ? id : value),
      event: (value) => (type = value),
      data: (value) => data.push(value),
      retry: (value) => /^\d+$/.test(value) && (this.#retry = Math.max(Number(value), 100)),
      "": () => (this.#attempts = 0), // a comment: the server is alive
    };
    const dispatch = () => {
      this.lastEventId = id;
      const event = { type: type || "message", data: data.join("\n"), id };
      const dropped = data.length === 0;
      [type, data] = ["", []];
      if (dropped || this.#closing.signal.aborted) return;
      this.#attempts = 0;
      this.#call("onevent", event);
    };
    return (text) => {
      // A CR ends its line at once. If an LF follows, it belongs to the same line end.
      const more = afterReturn ? text.replace(/^\n/, "") : text;
      const lines = (rest + more).split(/\r\n?|\n/);
      afterReturn = text.endsWith("\r");
      rest = lines.pop();
      for (const line of lines) {
        const [, field, value] = line.match(/^([^:]*):? ?(.*)$/s);
        if (line === "") dispatch();
        else if (Object.hasOwn(fields, field)) fields[field](value);
      }
    };
  }

  #tell(state, sentence) {
    if (!this.#closing.signal.aborted) this.#call("onstate", state, sentence);
  }

  #call(name, ...values) {
    try {
      this.#options[name](...values);
    } catch (error) {
      reportError(error); // shows the page's own error on the console, and reading continues
    }
  }
}

/** Return an error's reason: FastAPI's detail, the OpenAI API's message, or plain text. */
async function reasonOf(response) {
  const text = await response.text().catch(() => "");
  const plain = response.headers.get("Content-Type")?.startsWith("text/plain") ? text : "";
  let reason = plain.slice(0, 300);
  try {
    const { detail, error } = JSON.parse(text) ?? {};
    reason = detail?.[0]?.msg ?? detail ?? error?.message ?? error;
  } catch {
    // It is not JSON.
  }
  return typeof reason === "string" && reason ? `: ${reason.replace(/\.$/, "")}` : "";
}
