// Publish a line, and show what comes.
//
// fetch reads the feed here. An EventSource reconnects by itself, but gives up for good when the
// answer is no stream, such as a proxy's 502 while the server restarts. A new one cannot be told
// where to go on (https://github.com/whatwg/html/issues/2177), so there would be a hole.

const KEEP = 300; // lines on the page
const SILENCE = 25_000; // ms after which a connection is taken for dead; comments come each 10 s
const PAUSE = 1000; // ms before reconnecting, and up to as long again: not everybody in one moment
const PATIENCE = 20_000; // ms that publishing may take

const [form, publish, published, connection, feed] = [
  "write",
  "publish",
  "published",
  "connection",
  "feed",
].map((id) => document.getElementById(id));

// 1. What is written ------------------------------------------------------------------------------

let publishing = false;

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (publishing) return;
  publishing = true;
  publish.ariaDisabled = "true";
  tell(published, "open", "Publishing …");
  const { line } = form;
  const written = line.value;
  const problem = await post(written);
  if (problem) tell(published, "failed", problem);
  else {
    tell(published, "done", "Published.");
    if (line.value === written) line.value = "";
  }
  publishing = false;
  publish.ariaDisabled = "false";
});

/** Publish a line. Return nothing, or what is to be said of it. */
async function post(data) {
  let response;
  try {
    response = await fetch("feed", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ data }),
      signal: AbortSignal.timeout(PATIENCE),
    });
  } catch (error) {
    // The server may have had it, and died before its answer.
    return `Not known to be published, it may still appear: no answer (${error.message}).`;
  }
  if (response.ok) return null;
  const { detail } = await response.json().catch(() => ({}));
  if (response.status < 500) return `Refused (${response.status}): ${detail?.[0]?.msg ?? detail}`;
  if (typeof detail === "string") return detail;
  return `Not known to be published, it may still appear: the server answered ${response.status}.`;
}

// 2. What comes -----------------------------------------------------------------------------------

let place = null; // the id of the last event that came: where to go on
let atGap = false; // the newest on the page is a gap

async function follow() {
  tell(connection, "open", "Connecting …");
  for (;;) {
    const reason = await read().catch((error) => error.message);
    tell(connection, "failed", `Connection lost, reconnecting (${reason}).`);
    await new Promise((resolve) => setTimeout(resolve, PAUSE * (1 + Math.random())));
  }
}

/** Read after `place` until the connection ends. Return or throw the reason. */
async function read() {
  const silence = new AbortController();
  let timer;
  const awake = () => {
    clearTimeout(timer);
    timer = setTimeout(() => silence.abort(), SILENCE);
  };
  awake();
  try {
    const response = await fetch("feed", {
      cache: "no-store",
      headers: { Accept: "text/event-stream", ...(place && { "Last-Event-ID": place }) },
      signal: silence.signal,
    });
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      throw new Error(`the server answered ${response.status} and no stream`);
    }
    connected();
    for await (const events of eventsOf(response.body)) {
      awake();
      show(events);
      connected();
    }
    return "the server ended the stream";
  } catch (error) {
    throw silence.signal.aborted ? new Error("the server has fallen silent") : error;
  } finally {
    clearTimeout(timer);
  }
}

/** Without a place in the feed there is no promise that all comes that is written from now on. */
function connected() {
  if (place) tell(connection, "done", "Connected.");
}

/**
 * What has come, piece by piece: of each piece the events that end in it, perhaps none.
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
 */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let id = null;
  let [type, data] = ["message", []];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // an event that has not ended is none
      // A carriage return at the end may be the first half of a line's end.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      const events = [];
      for (const line of lines) {
        // A comment begins with the colon: its field has no name.
        const [, field, content] = line.match(/^([^:]*):? ?(.*)$/s);
        if (field === "id") id = content;
        if (field === "event") type = content;
        if (field === "data") data.push(content);
        if (line !== "") continue;
        events.push({ id, type, data: data.join("\n"), empty: data.length === 0 });
        [type, data] = ["message", []];
      }
      yield events;
    }
  } finally {
    reader.cancel().catch(() => {}); // it is broken already, or nobody wants the rest
  }
}

function show(events) {
  const entries = [];
  for (const { id, type, data, empty } of events) {
    place = id ?? place; // also from an event without data: such a one says where the feed begins
    if (empty) continue;
    const isGap = type === "gap";
    // Whoever reconnects before anything came after a gap is told of it again.
    if (!isGap) entries.push(entry("text", data));
    else if (!atGap) entries.push(entry("quiet", gapOf(JSON.parse(data))));
    atGap = isGap;
  }
  // All at once, and only what stays: of a thousand lines a screen reader is told the last.
  feed.prepend(...entries.slice(-KEEP).reverse());
  while (feed.childElementCount > KEEP) feed.lastElementChild.remove();
}

function gapOf({ reason }) {
  return `Lines may be missing here. ${reason}`;
}

function entry(style, words) {
  const item = document.createElement("li");
  item.className = style;
  item.textContent = words; // text stays text, whatever markup it is
  return item;
}

function tell(status, state, words) {
  if (status.textContent === words) return; // a screen reader would say it again
  status.dataset.state = state;
  status.textContent = words;
}

follow();
