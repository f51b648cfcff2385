// The log as it grows: its files as rows of blocks, its lines, and what is on the wire.

import { Source, Wire } from "./wire.js";

const LINES = 300; // on the page
const FILES = 3; // on the page
const WIDTH = 2000; // characters of a line on the page

const [status, files, log] = ["status", "files", "log"].map((id) => document.getElementById(id));
const list = log.appendChild(document.createElement("ol"));

new Source("log", { wire: new Wire(document.getElementById("wire")), onevent, onstate });

function onstate(state, sentence) {
  status.dataset.state = state;
  status.textContent = sentence;
}

function onevent({ type, data, id }) {
  const end = Number(id.split("-")[0]); // the offset after the line
  if (type === "rotated") {
    beginFile(end);
    addLine("rotated", "rotated");
    return;
  }
  // Where the first line begins is known only from its id, which says where it ends.
  if (!rows.length) beginFile(Math.max(end - new TextEncoder().encode(data).length - 1, 0));
  addBlock(end);
  const [, error, warning] = data.match(/\b(?:(error|critical|fatal)|(warn|warning))\b/i) ?? [];
  addLine(error ? "error" : warning ? "warning" : "line", data);
}

// The files ---------------------------------------------------------------------------------------

const rows = []; // the last few files; the last one is the log now

function beginFile(start) {
  rows.at(-1)?.row.classList.add("left");
  const row = files.appendChild(document.createElement("li"));
  const words = row.appendChild(document.createElement("p"));
  const bar = row.appendChild(document.createElement("div"));
  bar.className = "bar";
  rows.push({ row, words, bar, start, end: start, lines: 0 });
  if (rows.length > FILES) rows.shift().row.remove();
  showFiles();
}

function addBlock(end) {
  const file = rows.at(-1);
  const block = file.bar.appendChild(document.createElement("i"));
  block.style.flexGrow = end - file.end;
  file.end = end;
  file.lines += 1;
  if (file.bar.childElementCount > LINES) {
    file.start += Number(file.bar.firstChild.style.flexGrow);
    file.bar.firstChild.remove();
  }
  showFiles();
}

function showFiles() {
  const most = Math.max(1, ...rows.map(({ start, end }) => end - start));
  for (const { words, bar, start, end, lines } of rows) {
    const state = bar === rows.at(-1).bar ? "Now" : "Rotated";
    const place = `bytes ${start.toLocaleString("en")} to ${end.toLocaleString("en")}`;
    words.textContent = `${state}: ${lines} ${lines === 1 ? "line" : "lines"}, ${place}`;
    bar.style.width = `${((end - start) / most) * 100}%`; // all rows have one scale
  }
}

// The lines ---------------------------------------------------------------------------------------

function addLine(kind, text) {
  const line = document.createElement("li");
  line.className = kind;
  line.textContent = text.length > WIDTH ? `${text.slice(0, WIDTH)}…` : text;
  list.append(line);
  if (list.childElementCount > LINES) list.firstChild.remove();
}
