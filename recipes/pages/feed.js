// Read a channel and post in it. The channel is in the page's address: /?channel=goals

import { Source, Wire } from "./wire.js";

const KEEP = 100; // events on the page
const PATIENCE = 20_000; // ms that posting may take

const [feed, line, publish] = ["feed", "line", "publish"].map((id) => document.getElementById(id));
const channel = new URLSearchParams(location.search).get("channel") || "goals";
const url = `feed/${encodeURIComponent(channel)}`;
document.getElementById("channel").value = channel;
document.getElementById("feed-title").textContent = `Events in ${channel}, the newest first`;
document.title = `${channel} – feed`;

// 1. Reading --------------------------------------------------------------------------------------

const wire = new Wire(document.getElementById("wire"));
let state = "connecting";

// The last events are shown at once. After a broken connection, it resumes after the last id.
const source = new Source(`${url}?last=20`, {
  wire: {
    note: (text) => wire.note(text),
    add(text) {
      wire.add(text);
      queueMicrotask(tellConnection); // after it has been parsed
    },
  },
  onevent(event) {
    feed.prepend(event.type === "gap" ? gap(event) : entry(event));
    while (feed.childElementCount > KEEP) feed.lastElementChild.remove();
  },
  onstate(now, sentence) {
    state = now;
    tell("connection", state === "failed" ? "failed" : "open", sentence);
    if (state === "open") tellConnection();
  },
});

/** If the server is there but its log is not, there is no id yet to resume from. */
function tellConnection() {
  if (state !== "open") return;
  if (source.lastEventId) tell("connection", "done", "Connected.");
  else tell("connection", "open", "Connected. Waiting for the log …");
}

function entry({ type, data, id }) {
  const item = document.createElement("li");
  const posted = new Date(Number.parseInt(id)); // an id begins with its milliseconds
  const time = element("time", "", posted.toLocaleTimeString("en-GB"));
  const text = element("span", "text", data);
  if (type !== "message") text.prepend(element("span", "name", type), " ");
  item.append(time, text);
  return item;
}

function gap({ data }) {
  return element("li", "gap", `Events may be missing here. ${JSON.parse(data).reason}`);
}

/** Make an element. Markup in the words stays text. */
function element(tag, style, words) {
  const made = document.createElement(tag);
  made.className = style;
  made.textContent = words;
  return made;
}

// 2. Posting --------------------------------------------------------------------------------------

let posting = false;

document.getElementById("write").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (posting) return;
  posting = true;
  publish.ariaDisabled = "true";
  tell("published", "open", "Posting …");
  const written = line.value;
  const problem = await post({ data: written, event: document.getElementById("event").value || null });
  if (problem) tell("published", "failed", problem);
  else {
    tell("published", "done", "Posted.");
    if (line.value === written) line.value = "";
  }
  posting = false;
  publish.ariaDisabled = "false";
});

/** Post an event. Return null, or a sentence that says what went wrong. */
async function post(event) {
  let response;
  try {
    response = await fetch(url, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(event),
      signal: AbortSignal.timeout(PATIENCE),
    });
  } catch (error) {
    // The server may have published it, and died before it answered.
    return `No answer (${error.message}). The event may have been published or not.`;
  }
  if (response.ok) return null;
  const { detail } = await response.json().catch(() => ({}));
  if (response.status < 500) return `Refused (${response.status}): ${detail?.[0]?.msg ?? detail}`;
  if (typeof detail === "string") return detail;
  return `The server answered ${response.status}. The event may have been published or not.`;
}

function tell(id, now, words) {
  const status = document.getElementById(id);
  if (status.textContent === words) return; // a screen reader would say it again
  status.dataset.state = now;
  status.textContent = words;
}
