import { Source, Wire } from "./wire.js";
const [log, status, wire] = ["log", "status", "wire"].map((id) => document.getElementById(id));
new Source("log", {
  wire: new Wire(wire),
  onstate(state, sentence) {
    status.dataset.state = state;
    status.textContent = sentence;
  },
  onevent({ type, data }) {
    const li = document.createElement("li");
    li.textContent = `${type} ${data}`;
    log.append(li);
    while (log.childElementCount > 15) log.firstChild.remove();
  },
});
