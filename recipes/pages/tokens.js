// An answer over POST. An EventSource can only send GET, so `Source` reads it with fetch.

import { Source, Wire } from "./wire.js";

const [form, start, stop, status, answer] = ["ask", "start", "stop", "status", "answer"].map((id) =>
  document.getElementById(id),
);
const wire = new Wire(document.getElementById("wire"));
let reading = null; // the Source of the answer, while it is coming

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (reading) return;
  // In a text node, markup stays text.
  const text = new Text();
  answer.replaceChildren(text);
  let reason = null;
  let began = performance.now();
  const messages = [{ role: "user", content: form.question.value }];
  reading = new Source("v1/chat/completions", {
    wire,
    reconnect: false,
    silence: 0, // no limit: the server sends an error when the model has stalled
    init: {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: form.model.value, stream: true, messages }),
    },
    onstate(state, sentence) {
      if (state === "open") {
        began = performance.now();
        tell("open", "The answer is coming.");
      }
      if (state === "failed") end("failed", sentence);
      if (state === "over") finish(reason);
    },
    onevent({ data }) {
      if (data === "[DONE]") finish(reason ?? "stop");
      else show(data);
    },
  });
  // A screen reader reads out the complete answer, and not each token.
  answer.ariaBusy = "true";
  tell("open", "Waiting for the answer.");
  showButtons();

  function show(data) {
    try {
      const { error, choices } = JSON.parse(data);
      for (const { delta, finish_reason } of choices ?? []) {
        text.appendData(delta?.content ?? "");
        reason ??= finish_reason;
      }
      if (error) end("failed", error.message ?? String(error));
    } catch {
      end("failed", "The answer is not in the chat completions format.");
    }
  }

  // Only `[DONE]` or a `finish_reason` shows that the answer is complete.
  function finish(reason) {
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    if (reason === "stop") end("done", `The complete answer, in ${seconds} s.`);
    else if (reason) end("done", `The model ended its answer early, after ${seconds} s (${reason}).`);
    else end("failed", "The answer broke off.");
  }
});

stop.addEventListener("click", () => reading && end("stopped", "Stopped by you."));

form.question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

function end(state, words) {
  reading.close();
  reading = null;
  const part = answer.textContent && state !== "done";
  tell(state, part ? `${words} This is only the beginning of an answer.` : words);
  answer.ariaBusy = "false";
  showButtons();
}

function tell(state, words) {
  status.dataset.state = state;
  status.textContent = words;
}

function showButtons() {
  start.ariaDisabled = String(reading !== null);
  stop.ariaDisabled = String(reading === null);
}

try {
  const response = await fetch("v1/models");
  const { data } = await response.json();
  form.model.replaceChildren(...data.map(({ id }) => new Option(id)));
} catch (error) {
  tell("failed", `The models could not be listed (${error.message}).`);
}
