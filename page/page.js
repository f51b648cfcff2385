// The page: its form, its three lanes, and one drawing of all that is new for each frame.

import { axisEnd, inSeconds, Lane, lateness, spans, StreamError, ticks } from "./lane.js";
import { readNdjson, readSse, readText, Refused } from "./readers.js";
import { describe, NotAnEvent } from "./wire.js";

const READERS = { text: readText, ndjson: readNdjson, sse: readSse };
const MAX_TEXT = 400; // characters of a row that are shown

/** An element with these properties and children. What arrives only ever comes in as text. */
function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** Set only what has changed: a write that changes nothing costs a layout all the same. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function enable(button, enabled) {
  // Not `disabled`: that would take the focus away from a button that was just pressed.
  button.ariaDisabled = String(!enabled);
}

// A lane on the page -------------------------------------------------------------------------------

class View {
  #marks = new Map(); // from an event's id to its element
  #spans = [];
  #row = 0; // the number of the next row to show
  #axis = "";

  constructor(element) {
    this.element = element;
    this.stream = element.dataset.stream;
    this.title = element.querySelector("h2").textContent;
    const part = (name) => element.querySelector(`.${name}`);
    this.badge = part("badge");
    this.words = part("words");
    this.cut = part("cut");
    this.track = part("track");
    this.spans = part("spans");
    this.marks = part("marks");
    this.axis = part("axis");
    this.detail = part("detail");
    this.figures = {
      arrived: part("arrived"),
      first: part("first"),
      late: part("late"),
      resumed: part("resumed"),
    };
    this.wire = part("wire");
    this.hint = part("hint");
    this.explanation = this.hint.textContent;
    this.rows = this.wire.querySelector("ol");
    this.cut.addEventListener("click", () => {
      if (this.cut.ariaDisabled === "false") this.lane.cut();
    });
    this.#listen();
  }

  /** Show another lane, from its beginning. */
  show(lane) {
    this.lane = lane;
    this.#marks.clear();
    this.#spans = [];
    this.#row = 0;
    this.marks.replaceChildren();
    this.spans.replaceChildren();
    this.rows.replaceChildren();
    this.#showDetail(null);
    this.track.style.setProperty("--interval", lane.interval);
  }

  draw(now, end) {
    const { lane } = this;
    this.element.dataset.state = lane.state;
    this.element.classList.toggle("held-back", lane.state === "done" && lane.heldBack);
    setText(this.badge, lane.state);
    setText(this.words, lane.words);
    enable(this.cut, lane.state === "open" && !lane.complete);
    this.#drawAxis(end);
    this.#drawSpans(now);
    this.#drawMarks();
    this.#drawFigures();
    this.#drawRows();
  }

  #drawAxis(end) {
    const max = Math.max(3, Math.floor(this.track.clientWidth / 80));
    const key = `${end} ${max}`;
    if (key === this.#axis) return;
    this.#axis = key;
    this.track.style.setProperty("--end", end);
    // The moments at which events are due, as long as they can be told apart.
    const distance = (this.lane.interval / end) * this.track.clientWidth;
    this.track.classList.toggle("due", distance >= 6);
    this.axis.replaceChildren(
      ...ticks(end, max).map((seconds) => {
        const at = seconds / end;
        const label = at < 0.95 ? `${seconds.toLocaleString("en")} s` : ""; // no room for it
        const tick = make("span", { textContent: label });
        tick.style.setProperty("--at", at);
        return tick;
      }),
    );
  }

  #drawSpans(now) {
    for (const [i, { kind, from, to }] of spans(this.lane, now).entries()) {
      this.#spans[i] ??= this.spans.appendChild(make("div", { className: kind }));
      this.#spans[i].style.setProperty("--from", from);
      this.#spans[i].style.setProperty("--to", to);
    }
  }

  #drawMarks() {
    const { marks, latest } = this.lane;
    const items = latest && marks.items.at(-1) !== latest ? [...marks.items, latest] : marks.items;
    const wanted = new Set();
    for (const mark of items) {
      wanted.add(mark.id);
      if (this.#marks.has(mark.id)) continue;
      const element = make("button", { type: "button", tabIndex: -1, ariaLabel: this.#say(mark) });
      element.dataset.eventId = mark.id;
      element.style.setProperty("--at", mark.at);
      this.#marks.set(mark.id, element);
      this.marks.append(element);
    }
    for (const [id, element] of this.#marks) {
      if (wanted.has(id)) continue;
      element.remove();
      this.#marks.delete(id);
    }
    // One stop for the Tab key in each lane; the arrow keys go from mark to mark.
    if (!this.marks.querySelector('[tabindex="0"]') && this.marks.firstChild)
      this.marks.firstChild.tabIndex = 0;
  }

  #drawFigures() {
    const { count, first, latest, resumed } = this.lane;
    const drawn = this.#marks.size < count ? `, ${this.#marks.size} drawn` : "";
    setText(this.figures.arrived, `${count.toLocaleString("en")}${drawn}`);
    setText(this.figures.first, first ? inSeconds(first.at) : "–");
    setText(this.figures.late, latest ? lateness(latest.late) : "–");
    setText(this.figures.resumed, resumed ? `${resumed} ×` : "–");
  }

  #drawRows() {
    const { latest, count } = this.lane.rows;
    if (count === this.#row) return;
    const fresh = latest.filter(({ number }) => number >= this.#row);
    this.#row = count;
    const { scrollTop, scrollHeight, clientHeight } = this.wire;
    const atEnd = scrollHeight - scrollTop - clientHeight < 8;
    this.rows.append(...fresh.map((row) => this.#makeRow(row)));
    while (this.rows.children.length > latest.length) this.rows.firstChild.remove();
    const hidden = count - latest.length;
    setText(
      this.hint,
      hidden ? `${hidden.toLocaleString("en")} earlier rows are not shown.` : this.explanation,
    );
    if (atEnd) this.wire.scrollTop = this.wire.scrollHeight;
  }

  #makeRow(row) {
    const content = make("span", { className: "content" });
    if (row.kind === "chunk") {
      row.pieces.forEach((bytes, i) => {
        const piece = make("span", { className: "piece" });
        piece.dataset.chunk = row.first + i;
        piece.append(
          ...describe(bytes).map(({ text, split }) =>
            split ? make("mark", { textContent: text }) : text,
          ),
        );
        content.append(piece);
      });
      if (row.left) content.append(` and ${row.left.toLocaleString("en")} more pieces`);
    } else {
      content.textContent =
        row.text.length > MAX_TEXT ? `${row.text.slice(0, MAX_TEXT)} …` : row.text;
    }
    return make(
      "li",
      { className: row.kind },
      make("span", { className: "at", textContent: row.at.toFixed(3) }),
      content,
    );
  }

  #say(mark) {
    return `${this.lane.name(mark)}: ${mark.text}, after ${inSeconds(mark.at)}, ${lateness(mark.late)}`;
  }

  // Hovering over the track shows the nearest mark, focusing a mark shows that one.

  #listen() {
    this.track.addEventListener("pointermove", ({ clientX }) => {
      const { left, width } = this.track.getBoundingClientRect();
      const end = Number(this.track.style.getPropertyValue("--end"));
      const at = ((clientX - left) / width) * end;
      let nearest = null;
      for (const element of this.#marks.values()) {
        const distance = Math.abs(element.style.getPropertyValue("--at") - at);
        if (!nearest || distance < nearest.distance) nearest = { element, distance };
      }
      if (nearest) this.#showDetail(nearest.element);
    });
    this.track.addEventListener("pointerleave", () =>
      this.#showDetail(this.marks.querySelector(":focus")),
    );
    this.marks.addEventListener("focusin", ({ target }) => {
      for (const other of this.marks.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
      target.tabIndex = 0;
      this.#showDetail(target);
    });
    this.marks.addEventListener("focusout", () => this.#showDetail(null));
    this.marks.addEventListener("keydown", (event) => {
      const { target } = event;
      const { firstChild, lastChild } = this.marks;
      const goal = {
        ArrowLeft: target.previousSibling,
        ArrowRight: target.nextSibling,
        Home: firstChild,
        End: lastChild,
      }[event.key];
      if (goal === undefined) return;
      event.preventDefault();
      goal?.focus();
    });
  }

  #showDetail(mark) {
    this.marks.querySelector(".shown")?.classList.remove("shown");
    this.detail.hidden = mark === null;
    if (mark === null) return;
    mark.classList.add("shown");
    this.detail.textContent = mark.ariaLabel;
    const middle = mark.offsetLeft + mark.offsetWidth / 2;
    const room = this.track.clientWidth - this.detail.offsetWidth;
    this.detail.style.left = `${Math.max(0, Math.min(room, middle - this.detail.offsetWidth / 2))}px`;
  }
}

// The whole page -----------------------------------------------------------------------------------

const form = document.querySelector("#choices");
const fields = [form.elements.steps, form.elements.interval];
const stopButton = document.querySelector("#stop");
const views = [...document.querySelectorAll("[data-stream]")].map((element) => new View(element));
let running = new AbortController();

function start() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  for (const field of fields) tell(field, "");
  const query = String(new URLSearchParams(new FormData(form)));
  const from = performance.now();
  const seconds = () => (performance.now() - from) / 1000;
  const [steps, interval] = fields.map(({ value }) => Number(value));
  for (const view of views) {
    const lane = new Lane({ stream: view.stream, steps, interval, seconds });
    view.show(lane);
    read(view.stream, query, lane, signal);
  }
  draw(signal, seconds, (steps - 1) * interval);
}

async function read(stream, query, lane, signal) {
  try {
    await READERS[stream](`${stream}?${query}`, lane, signal);
  } catch (error) {
    if (signal.aborted) {
      lane.stopped();
      return;
    }
    const expected = error instanceof StreamError || error instanceof NotAnEvent;
    lane.failed(expected ? error.message : `the page has a defect (${error}).`);
    if (error instanceof Refused) showProblems(error.problems);
    if (!expected) throw error;
  }
}

/** Draw a frame, and the next ones until all lanes are over or other lanes are shown. */
function draw(signal, seconds, duration) {
  if (running.signal !== signal) return;
  const lanes = views.map(({ lane }) => lane);
  const over = lanes.every(({ ended }) => ended !== null);
  const now = seconds();
  // A lane that has all its events may still wait for a 204, which needs no room on the axis.
  const end = axisEnd(
    duration,
    Math.max(
      ...lanes.map(({ ended, complete, latest }) => (complete ? latest.at : (ended ?? now))),
    ),
  );
  for (const view of views) view.draw(now, end);
  enable(stopButton, !over);
  if (!over) requestAnimationFrame(() => draw(signal, seconds, duration));
}

/** What the server found wrong, beside the fields that it is about. */
function showProblems(problems) {
  for (const { loc, msg } of problems) {
    const field = fields.find(({ name }) => name === loc.at(-1));
    if (field) tell(field, msg);
  }
  fields.find(({ ariaInvalid }) => ariaInvalid === "true")?.focus();
}

function tell(field, problem) {
  field.ariaInvalid = String(problem !== "");
  setText(document.getElementById(`${field.name}-problem`), problem);
}

/** Tell a screen reader of changes of state, not of events, and not more often than each second. */
const told = new Map();
let toldAt = -Infinity;
function announce() {
  const news = views.filter(({ stream, lane }) => lane && told.get(stream) !== lane.words);
  if (!news.length || performance.now() - toldAt < 1000) return;
  for (const { stream, lane } of news) told.set(stream, lane.words);
  setText(
    document.querySelector("#news"),
    news.map(({ title, lane }) => `${title}: ${lane.words}`).join(" "),
  );
  toldAt = performance.now();
}
setInterval(announce, 250);

function keepInAddress() {
  history.replaceState(null, "", `?${new URLSearchParams(new FormData(form))}`);
}

for (const [name, value] of new URLSearchParams(location.search)) {
  const field = fields.find((field) => field.name === name);
  if (field) field.value = value;
}
form.addEventListener("input", keepInAddress);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  keepInAddress();
  start();
});
stopButton.addEventListener("click", () => running.abort());
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard; // there only on localhost and https
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.closest("figure").querySelector("pre").textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}
// On a narrow screen the code would push the lanes apart.
if (!matchMedia("(min-width: 70rem)").matches) {
  for (const details of document.querySelectorAll("details")) details.open = false;
}
