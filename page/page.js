// The page: its form and its three lanes. In each frame, it draws all that is new at once.

import { axisEnd, inSeconds, isLate, Lane, lateness, spans, StreamError, ticks } from "./lane.js";
import { readNdjson, readSse, readText, Refused } from "./readers.js";
import { describe, NotAnEvent } from "./wire.js";

const STREAMS = [
  {
    stream: "text",
    title: "Plain text",
    mediaType: "text/plain",
    read: readText,
    hint: "Pieces as client.py reads them: at most 16 bytes of a chunk from the network.",
  },
  {
    stream: "ndjson",
    title: "NDJSON",
    mediaType: "application/x-ndjson",
    read: readNdjson,
    hint: "Each line is an event.",
  },
  {
    stream: "sse",
    title: "Server-sent events",
    mediaType: "text/event-stream",
    read: readSse,
    hint: "The fields of each event, as EventSource gives them.",
  },
];
const MAX_TEXT = 400; // characters of a row that are shown

/** An element with these properties and children. What arrives is only ever added as text. */
function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** Set only what has changed: even a write that changes nothing costs a layout. */
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
  #revised = 0; // the lane's lateness as the marks show it
  #row = 0; // the number of the next row to show

  /** Make a lane's element, from the template. */
  constructor(template, { stream, title, mediaType, read, hint }) {
    this.element = template.content.cloneNode(true).firstElementChild;
    this.stream = stream;
    this.title = title;
    this.read = read;
    this.hint = hint;
    const part = (name) => this.element.querySelector(`.${name}`);
    this.badge = part("badge");
    this.words = part("words");
    this.cut = part("cut");
    this.track = part("track");
    this.spans = part("spans");
    this.marks = part("marks");
    this.detail = part("detail");
    this.figures = {
      arrived: part("arrived"),
      first: part("first"),
      latest: part("latest"),
      resumed: part("resumed"),
    };
    this.wire = part("wire");
    this.hintLine = part("hint");
    this.rows = this.wire.querySelector("ol");

    this.element.dataset.stream = stream;
    this.element.ariaLabel = title;
    this.element.querySelector("h2").textContent = title;
    this.cut.ariaLabel = `Cut the connection of ${title}`;
    this.marks.ariaLabel = `${title}: arrivals`;
    part("media").querySelector("code").textContent = `GET /${stream}`;
    part("media").querySelector("span").textContent = mediaType;
    this.wire.ariaLabel = `${title}: on the wire`;
    this.hintLine.textContent = hint;
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
    this.#revised = 0;
    this.#row = 0;
    this.marks.replaceChildren();
    this.spans.replaceChildren();
    this.rows.replaceChildren();
    this.point(null);
  }

  draw(now) {
    const { lane } = this;
    this.element.dataset.state = lane.state;
    this.element.classList.toggle("held-back", lane.state === "done" && lane.heldBack);
    setText(this.badge, lane.state);
    setText(this.words, lane.words);
    enable(this.cut, lane.state === "open" && !lane.complete);
    this.#drawSpans(now);
    this.#drawMarks();
    this.#drawFigures();
    this.#drawRows();
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
    const revised = this.#revised !== this.lane.revised;
    this.#revised = this.lane.revised;
    const wanted = new Set();
    for (const mark of items) {
      wanted.add(mark.id);
      let element = this.#marks.get(mark.id);
      if (element && !revised) continue;
      if (!element) {
        element = make("button", { type: "button", tabIndex: -1 });
        element.dataset.eventId = mark.id;
        element.style.setProperty("--at", mark.at);
        this.#marks.set(mark.id, element);
        this.marks.append(element);
      }
      const late = this.lane.late(mark);
      element.ariaLabel = this.#say(mark);
      element.classList.toggle("late", isLate(late));
      element.style.setProperty("--late", late);
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
    setText(this.figures.latest, latest ? lateness(this.lane.late(latest)) : "–");
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
      this.hintLine,
      hidden ? `${hidden.toLocaleString("en")} earlier rows are not shown.` : this.hint,
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
    const late = lateness(this.lane.late(mark));
    return `${this.lane.name(mark)} after ${inSeconds(mark.at)}, ${late}: ${mark.text}`;
  }

  // Hovering over a track shows the nearest event; focusing a mark shows its event.

  #listen() {
    this.track.addEventListener("pointermove", ({ clientX }) => {
      const { left, width } = this.track.getBoundingClientRect();
      const at = ((clientX - left) / width) * axis.end;
      let nearest = null;
      for (const [id, element] of this.#marks) {
        const distance = Math.abs(element.style.getPropertyValue("--at") - at);
        if (!nearest || distance < nearest.distance) nearest = { id, distance };
      }
      if (nearest) pointAt(nearest.id);
    });
    this.track.addEventListener("pointerleave", () => {
      const id = this.marks.querySelector(":focus")?.dataset.eventId;
      pointAt(id === undefined ? null : Number(id));
    });
    this.marks.addEventListener("focusin", ({ target }) => {
      for (const other of this.marks.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
      target.tabIndex = 0;
      pointAt(Number(target.dataset.eventId));
    });
    this.marks.addEventListener("focusout", () => pointAt(null));
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

  /** Show beside its mark what an event was and when it came, if this lane shows it. */
  point(id) {
    this.marks.querySelector(".shown")?.classList.remove("shown");
    const mark = this.#marks.get(id);
    this.detail.hidden = !mark;
    if (!mark) return;
    mark.classList.add("shown");
    this.detail.textContent = mark.ariaLabel;
    const beside = mark.offsetLeft + mark.offsetWidth + 6;
    const room = this.track.clientWidth - this.detail.offsetWidth;
    this.detail.style.left = `${Math.max(0, Math.min(room, beside))}px`;
  }
}

/** The same event in all lanes, or none. */
function pointAt(id) {
  for (const view of views) view.point(id);
}

// The complete page --------------------------------------------------------------------------------

const form = document.querySelector("#choices");
const fields = [form.elements.steps, form.elements.interval];
const stopButton = document.querySelector("#stop");
const main = document.querySelector("main");
const views = STREAMS.map((stream) => new View(main.querySelector("template"), stream));
main.prepend(...views.map(({ element }) => element));
main.hidden = false;
const axis = { element: main.querySelector(".ticks"), end: 0, max: 0 };
let running = new AbortController();

function start() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  for (const field of fields) tell(field, "");
  const query = String(new URLSearchParams(new FormData(form)));
  const from = performance.now();
  const seconds = () => (performance.now() - from) / 1000;
  for (const view of views) {
    const lane = new Lane({ stream: view.stream, seconds, ...chosen() });
    view.show(lane);
    read(view, query, lane, signal);
  }
  draw(signal, seconds);
}

/** The choices as numbers; NaN for what is not a number. */
function chosen() {
  const [steps, interval] = fields.map(({ value }) => Number(value));
  return { steps, interval };
}

/** How long such a stream takes if it is not cut, in seconds. */
const duration = ({ steps, interval }) => (steps - 1) * interval;

async function read(view, query, lane, signal) {
  try {
    await view.read(`${view.stream}?${query}`, lane, signal);
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
function draw(signal, seconds) {
  if (running.signal !== signal) return;
  const lanes = views.map(({ lane }) => lane);
  const over = lanes.every(({ ended }) => ended !== null);
  const now = seconds();
  // A lane that has all its events may still wait for a 204, which needs no room on the axis.
  const end = axisEnd(
    duration(lanes[0]),
    Math.max(
      ...lanes.map(({ ended, complete, latest }) => (complete ? latest.at : (ended ?? now))),
    ),
  );
  drawAxis(end);
  for (const view of views) view.draw(now);
  enable(stopButton, !over);
  if (!over) requestAnimationFrame(() => draw(signal, seconds, duration));
}

function drawAxis(end) {
  const { clientWidth } = axis.element;
  const max = Math.max(3, Math.floor(clientWidth / 64));
  if (end === axis.end && max === axis.max) return;
  Object.assign(axis, { end, max });
  const seconds = ticks(end, max);
  main.style.setProperty("--end", end);
  main.style.setProperty("--step", seconds[1]);
  axis.element.replaceChildren(
    ...seconds.map((at) => {
      const label = at < 0.95 * end ? `${at.toLocaleString("en")} s` : ""; // no room for it
      const tick = make("span", { textContent: label });
      tick.style.setProperty("--at", at);
      return tick;
    }),
  );
}

/** Show what the server found wrong, beside the fields in question. */
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

/** Tell a screen reader about changes of state, not events, at most once a second. */
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
drawAxis(axisEnd(duration(chosen()), 0));
// A narrower window has room for fewer labels, even when no stream runs.
new ResizeObserver(() => drawAxis(axis.end)).observe(axis.element);
form.addEventListener("input", keepInAddress);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  keepInAddress();
  start();
});
stopButton.addEventListener("click", () => running.abort());
if (navigator.clipboard) { // it exists only on localhost and https
  for (const figure of document.querySelectorAll("figure")) {
    const button = make("button", { type: "button", className: "copy", textContent: "Copy" });
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(figure.querySelector("pre").textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    figure.querySelector("figcaption").append(button);
  }
}
