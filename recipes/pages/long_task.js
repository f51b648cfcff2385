// Starts a task and follows it. This page remembers nothing: the task is in the address, and the
// server knows the rest.

import { Source, Wire } from "./wire.js";

const [form, parts, seconds, start, cancel, status, card, bar, done, left, cells] = [
  "new", "parts", "seconds", "start", "cancel", "status", "task", "bar", "done", "left", "cells",
].map((id) => document.getElementById(id));
const wire = new Wire(document.getElementById("wire"));

const AGAIN = 2000; // milliseconds until the next try

let view = 0; // counts what was shown: an answer for an earlier view is too late
let source = null; // of the task that is shown
let running = null; // the id of the task that can be cancelled
let cancelled = false; // it was asked to stop, and will stop before its next part

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const time = (s) => (s < 90 ? `${Math.ceil(s)} s` : `${Math.ceil(s / 60)} min`);
const setDisabled = (button, disabled) => button.setAttribute("aria-disabled", String(disabled));
const isDisabled = (button) => button.getAttribute("aria-disabled") === "true";

function say(sentence, state = "") {
  status.textContent = sentence;
  status.dataset.state = state;
}

// Ask until there is an answer: a server that is down, or has no database, comes back.
async function ask(path, options, isWanted) {
  while (isWanted()) {
    try {
      wire.note(`> ${options.method ?? "GET"} /${path}`);
      const response = await fetch(path, options);
      wire.note(`< ${response.status}`);
      if (response.status < 500) {
        return { ok: response.ok, answer: await response.json() };
      }
    } catch {
      // No connection, or one that was cut.
    }
    say("The server does not answer. Trying again …", "failed");
    await sleep(AGAIN);
  }
  return {};
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (isDisabled(start)) {
    return;
  }
  setDisabled(start, true);
  say("Starting …");
  const task = { parts: Number(parts.value), seconds: Number(seconds.value) };
  // The same key for each try: if only the answer was lost, the task is not started twice.
  const key = crypto.getRandomValues(new Uint32Array(4)).join("-");
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
  const options = { method: "POST", headers, body: JSON.stringify(task) };
  const { ok, answer } = await ask("tasks", options, () => true);
  setDisabled(start, Boolean(running));
  if (ok) {
    location.hash = answer.task_id; // which shows it
  } else {
    say(answer.detail.map(({ loc, msg }) => `${loc.at(-1)}: ${msg}.`).join(" "), "failed");
  }
});

cancel.addEventListener("click", async () => {
  const id = running;
  if (id && !isDisabled(cancel)) {
    cancelled = true;
    setDisabled(cancel, true);
    left.textContent = "";
    say("It stops before its next part.");
    await ask(`tasks/${id}`, { method: "DELETE" }, () => running === id);
  }
});

function setRunning(id) {
  running = id;
  cancelled = false;
  setDisabled(cancel, !id);
  setDisabled(start, Boolean(id));
}

function show() {
  const id = location.hash.slice(1);
  const mine = ++view;
  source?.close();
  setRunning(null);
  card.hidden = true;
  say(id ? "Looking for the task …" : "No task yet.");
  if (id) {
    follow(id, () => mine === view);
  }
}

async function follow(id, isShown) {
  const path = `tasks/${encodeURIComponent(id)}`;
  const { ok, answer: first } = await ask(path, {}, isShown);
  if (!isShown()) {
    return;
  }
  if (!ok) {
    say("There is no such task.", "failed");
    return;
  }
  const looking = performance.now();
  let painted = 0; // cells

  function draw(task) {
    bar.max = task.parts;
    bar.value = task.done;
    done.textContent = `${task.done} of ${task.parts} parts`;
    for (; painted < task.done; painted++) cells.children[painted].className = "done";
    const next = cells.children[painted];
    if (next) next.className = running ? "now" : "";
    // At the pace since this page began to follow the task.
    const pace = (performance.now() - looking) / 1000 / (task.done - first.done);
    const isKnown = task.done > first.done && task.done < task.parts && running && !cancelled;
    left.textContent = isKnown ? `${time(pace * (task.parts - task.done))} left` : "";
  }

  function end(task) {
    setRunning(null);
    draw(task);
    const far = `${task.done} of ${task.parts} parts`;
    if (task.status === "done") {
      say(`Done, after ${task.result.seconds} seconds of work.`, "done");
    } else if (task.status === "cancelled") {
      say(`Cancelled after ${far}.`);
    } else {
      say(`Failed after ${far}: ${task.error}`, "failed");
    }
  }

  setRunning(id);
  cells.replaceChildren(...Array.from({ length: first.parts }, () => document.createElement("i")));
  draw(first);
  card.hidden = false;
  source = new Source(`${path}/events`, {
    wire,
    onevent({ type, data }) {
      const task = JSON.parse(data);
      if (type === "end") {
        source.close();
        end(task);
      } else {
        draw(task);
      }
    },
    onstate(state, sentence) {
      if (state === "open") {
        say(cancelled ? "It stops before its next part." : "Running.");
      } else if (state === "failed") {
        setRunning(null);
        say(sentence, "failed");
      } else if (sentence !== "Connecting …") {
        say("The connection is lost, but the task goes on. Trying again …", "failed");
      }
    },
  });
}

window.addEventListener("hashchange", show);
show();
