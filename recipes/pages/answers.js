// Asks a question, and shows an answer. This page remembers nothing: the id of the answer is in the
// address, and the server knows the rest.

import { Source, Wire } from "./wire.js";

const [form, start, stop, status, card, answer, pre] = [
  "ask", "start", "stop", "status", "card", "answer", "wire",
].map((id) => document.getElementById(id));
const wire = new Wire(pre);

let source = null; // reads the answer that is shown
let asking = false;

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (asking) return;
  asking = true;
  start.ariaDisabled = "true";
  tell("connecting", "Asking …");
  const body = { model: form.model.value, input: form.question.value, background: true };
  try {
    const { id } = await post("v1/responses", body);
    location.hash = id; // which shows it
  } catch (error) {
    tell("failed", error.message);
  }
  asking = false;
  start.ariaDisabled = "false";
});

// Anybody who has the id can stop it. The last event tells every reader, including this page.
stop.addEventListener("click", async () => {
  if (stop.ariaDisabled === "true") return;
  try {
    await post(`v1/responses/${shownId()}/cancel`);
  } catch (error) {
    tell("failed", error.message);
  }
});

function shownId() {
  return encodeURIComponent(location.hash.slice(1));
}

/** Show the answer whose id is in the address, from its first event on. */
function show() {
  source?.close();
  source = null;
  stop.ariaDisabled = "true";
  card.hidden = !location.hash.slice(1);
  answer.replaceChildren();
  if (card.hidden) {
    tell("", "No answer yet.");
    return;
  }
  // A screen reader reads out the complete answer, and not each token.
  answer.ariaBusy = "true";
  const text = answer.appendChild(new Text()); // in a text node, markup is text
  source = new Source(`v1/responses/${shownId()}?stream=true`, {
    wire,
    onstate(state, sentence) {
      stop.ariaDisabled = String(state !== "open");
      tell(state, state === "open" ? "The answer is coming." : sentence);
    },
    onevent({ data }) {
      const { type, delta, response } = JSON.parse(data);
      if (type === "response.output_text.delta") text.appendData(delta);
      if (response && response.status !== "in_progress") over(response);
    },
  });
}

function over({ status: how, error, incomplete_details: details }) {
  source.close();
  stop.ariaDisabled = "true";
  answer.ariaBusy = "false";
  if (how === "completed") tell("done", "The answer is complete.");
  else if (how === "cancelled") tell("stopped", "Stopped. This is the beginning of an answer.");
  else if (how === "failed") tell("failed", `Failed: ${error.message}`);
  else tell("stopped", `The model ended its answer early (${details?.reason}).`);
}

/** Return the server's answer. Throws an error that says what went wrong. */
async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body) };
  wire.note(`> POST /${path}`);
  const response = await fetch(path, options).catch((error) => {
    throw new Error(`The server cannot be reached (${error.message}).`);
  });
  wire.note(`< ${response.status} ${response.headers.get("Content-Type")}`);
  const answered = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answered.error?.message ?? `The server answered ${response.status}.`);
  return answered;
}

function tell(state, words) {
  if (status.textContent === words) return; // a screen reader would say it again
  status.dataset.state = state;
  status.textContent = words;
}

window.addEventListener("hashchange", show);
show();
