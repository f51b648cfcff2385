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

// 1. What comes -----------------------------------------------------------------------------------

const wire = new Wire(document.getElementById("wire"));
let state = "connecting";

// The last events are there at once. When the connection breaks, the id of the last one counts.
const source = new Source(`${url}?last=20`, {
  wire: {
    note: (text) => wire.note(text),
    add(text) {
      wire.add(text);
      queueMicrotask(tellConnection); // when it has been parsed
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

/** The server may be there while its log is not: then there is no id to go on from yet. */
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

/** Text stays text, whatever markup it is. */
function element(tag, style, words) {
  const made = document.createElement(tag);
  made.className = style;
  made.textContent = words;
  return made;
}

// 2. What is posted -------------------------------------------------------------------------------

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

/** Post an event. Return nothing, or what is to be said of it. */
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
    // The server may have had it, and died before its answer.
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
