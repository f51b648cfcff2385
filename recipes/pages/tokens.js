// Server-sent events over POST: an EventSource can only send GET, so fetch reads them.

const [form, start, stop, status, answer] = ["ask", "start", "stop", "status", "answer"].map((id) =>
  document.getElementById(id),
);
let asking = null; // the AbortController of the request, while there is one

/** What is wrong, in a sentence for who asks. */
class Failure extends Error {}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (asking) return;
  asking = new AbortController();
  answer.replaceChildren();
  // A screen reader is told of the answer when it is there, and not of each token.
  answer.ariaBusy = "true";
  showButtons();
  tell("open", "Asked.");
  try {
    tell("done", await ask(form.question.value, form.model.value, asking.signal));
  } catch (error) {
    const rest = answer.textContent ? " This is only the beginning of an answer." : "";
    if (asking.signal.aborted) tell("stopped", `Stopped by you.${rest}`);
    else if (error instanceof Failure) tell("failed", error.message + rest);
    else tell("failed", `The answer broke off (${error.message}).${rest}`);
  }
  asking = null;
  answer.ariaBusy = "false";
  showButtons();
});

stop.addEventListener("click", () => asking?.abort());

/** Show the answer to a question as it comes. Return what is to be said of it at its end. */
async function ask(question, model, signal) {
  const body = { model, stream: true, messages: [{ role: "user", content: question }] };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  tell("open", "The answer is coming.");
  const began = performance.now();
  // In a text node all is text, whatever markup it is.
  const text = answer.appendChild(new Text());
  let reason = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") break;
    const { error, choices } = JSON.parse(data);
    if (error) throw new Failure(error.message);
    for (const { delta, finish_reason } of choices) {
      text.appendData(delta.content ?? "");
      reason ??= finish_reason;
    }
  }
  // Only the reason tells a whole answer from the beginning of one.
  if (!reason) throw new Failure("The answer broke off.");
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  if (reason === "stop") return `The whole answer, in ${seconds} s.`;
  return `The model ended its answer early, after ${seconds} s (${reason}).`;
}

/** Like fetch, but an answer that is an error is thrown. */
async function request(url, options) {
  const response = await fetch(url, options).catch((error) => {
    throw new Failure(`The server cannot be reached (${error.message}).`);
  });
  if (response.ok) return response;
  const problem = await response.json().catch(() => null);
  throw new Failure(problem?.error?.message ?? `The server answered ${response.status}.`);
}

/**
 * The data of each event in a body.
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
 */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      // A carriage return at the end may be the first half of a line's end.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        // A comment begins with the colon: its field has no name.
        const [, field, content] = line.match(/^([^:]*):? ?(.*)$/s);
        if (field === "data") data.push(content);
        if (line !== "") continue;
        if (data.length) yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it is broken already, or nobody wants the rest
  }
}

function tell(state, words) {
  status.dataset.state = state;
  status.textContent = words;
}

function showButtons() {
  start.ariaDisabled = String(asking !== null);
  stop.ariaDisabled = String(asking === null);
}

try {
  const { data } = await (await request("v1/models")).json();
  form.model.replaceChildren(...data.map(({ id }) => new Option(id)));
} catch (error) {
  tell("failed", error.message);
}
