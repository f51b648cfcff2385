// The page's logic without a page. Run it with `node --test tests/page/page_logic.test.mjs`.
import assert from "node:assert/strict";
import { test } from "node:test";

import {
  axisEnd,
  Lane,
  lateness,
  MAX_MARKS,
  MAX_ROWS,
  spans,
  StreamError,
  Tail,
  Thinned,
  ticks,
} from "../../page/lane.js";
import {
  cut,
  decodeLine,
  describe,
  lines,
  messages,
  NotAnEvent,
  parseEvent,
} from "../../page/wire.js";

const bytes = (text) => new TextEncoder().encode(text);
const text = (parts) => parts.map((part) => part.text).join("");

/** What these transforms make of these chunks. */
async function through(chunks, ...transforms) {
  let stream = new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
  for (const transform of transforms) stream = stream.pipeThrough(transform);
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

test("bytes are cut as client.py cuts them, and a split character is shown as split", () => {
  const pieces = cut(bytes("Step 1 of 10: ☕\n"));
  assert.deepEqual(
    pieces.map((piece) => piece.length),
    [16, 2],
  );
  assert.deepEqual(describe(pieces[0]), [
    { text: "Step 1 of 10: ", split: false },
    { text: "\\xe2\\x98", split: true },
  ]);
  assert.deepEqual(describe(pieces[1]), [
    { text: "\\x95", split: true },
    { text: "\\n", split: false },
  ]);
});

test("any bytes can be described, without a replacement character", () => {
  assert.equal(text(describe(bytes("aé☕😀\u0000\t\u007f"))), "aé☕😀\\x00\\x09\\x7f");
  const wrong = Uint8Array.from([
    0xff, 0xc0, 0x80, 0xed, 0xa0, 0x80, 0xf4, 0x90, 0x80, 0x80, 0xe2, 0x28,
  ]);
  assert.equal(text(describe(wrong)), "\\xff\\xc0\\x80\\xed\\xa0\\x80\\xf4\\x90\\x80\\x80\\xe2(");
  for (let i = 0; i < 1000; i++) {
    const some = crypto.getRandomValues(new Uint8Array(20));
    assert.ok(!text(describe(some)).includes("\ufffd"));
  }
});

test("lines come whole however the network cuts them, and the cut one at the end is told apart", async () => {
  const whole = bytes("eins ☕\n\nzwei\ndre");
  for (let size = 1; size <= whole.length; size++) {
    const found = await through(cut(whole, size), lines());
    assert.deepEqual(found.map(decodeLine), ["eins ☕", "", "zwei", null]);
  }
  assert.throws(() => decodeLine(Uint8Array.from([0xff, 0x0a])), NotAnEvent);
});

test("a line of 1 MB in small chunks is read whole", async () => {
  const long = "x".repeat(2 ** 20);
  const [line] = await through(cut(bytes(`${long}\n`), 1400), lines());
  assert.equal(decodeLine(line), long);
});

test("an event is an event, and nothing else is", () => {
  const event = { event_id: 0, data: "Step 1 of 1: ☕", is_last_event: true };
  assert.deepEqual(parseEvent(JSON.stringify(event)), event);
  for (const wrong of [
    "",
    "{",
    "null",
    "[]",
    "1",
    "<html>",
    '{"event_id":"0","data":"","is_last_event":true}',
  ]) {
    assert.throws(() => parseEvent(wrong), NotAnEvent, wrong);
  }
});

test("messages are read from an event stream as the standard says", async () => {
  const stream = [
    ": a comment\n\n",
    "id: 0\nretry: 1000\ndata: one\n\n",
    "data: two\ndata: lines\n\n",
    "id:1\r\ndata:no space\r\n\r\n",
    "data\n\n",
    "id: 2\n\n",
    "data: the id holds on\n\n",
    "id\ndata: no id any more\n\n",
    "data: never dispatched",
  ].join("");
  for (const size of [1, 7, 1000]) {
    assert.deepEqual(await through(cut(bytes(stream), size), lines(), messages()), [
      { lastEventId: "0", data: "one" },
      { lastEventId: "0", data: "two\nlines" },
      { lastEventId: "1", data: "no space" },
      { lastEventId: "1", data: "" },
      { lastEventId: "2", data: "the id holds on" },
      { lastEventId: "", data: "no id any more" },
    ]);
  }
});

function laneAt(options = {}) {
  const clock = { now: 0 };
  const lane = new Lane({
    stream: "ndjson",
    steps: 10,
    interval: 1,
    seconds: () => clock.now,
    ...options,
  });
  const take = (id, at) => {
    clock.now = at;
    return lane.take({
      event_id: id,
      data: `Step ${id + 1}`,
      is_last_event: id === lane.steps - 1,
    });
  };
  return { clock, lane, take };
}

test("lateness counts from the server's schedule, which starts anew when the stream is resumed", () => {
  const { clock, lane, take } = laneAt();
  lane.opened();
  const late = (id, at) => (take(id, at), Math.round(lane.late(lane.latest) * 1000));
  assert.deepEqual([late(0, 0.5), late(1, 1.5), late(2, 2.75)], [0, 0, 250]);
  clock.now = 3;
  lane.lost("the connection was cut");
  assert.equal(lane.state, "resuming");
  assert.match(lane.words, /after event 2/);
  clock.now = 7;
  lane.opened();
  assert.deepEqual([late(3, 7.125), late(4, 8.25)], [0, 125]);
  assert.equal(lane.resumed, 1);
  assert.deepEqual(spans(lane, 9), [
    { kind: "open", from: 0, to: 3 },
    { kind: "gap", from: 3, to: 7 },
    { kind: "open", from: 7, to: 9 },
  ]);
});

test("nothing is early: an event that came sooner shows that those before it were late", () => {
  const { lane, take } = laneAt();
  const late = () => lane.marks.items.map((mark) => Math.round(lane.late(mark) * 1000));
  lane.opened();
  take(0, 0.5);
  assert.deepEqual(late(), [0]);
  const { revised } = lane;
  take(1, 1.25);
  assert.deepEqual(late(), [250, 0]);
  assert.ok(lane.revised > revised, "what was said of event 0 has to be said anew");
  take(2, 2.5);
  assert.deepEqual(late(), [250, 0, 250]);
});

test("lateness is told in words, and only where a person could see it", () => {
  assert.deepEqual([0, 0.045, 0.0999, 0.1, 9, null].map(lateness), [
    "on time",
    "on time",
    "on time",
    "100 ms late",
    "9,000 ms late",
    "no schedule",
  ]);
});

test("an event that comes twice counts once, and one that is missing is a failure", () => {
  const { lane, take } = laneAt();
  lane.opened();
  assert.ok(take(0, 0));
  assert.ok(!take(0, 0));
  assert.equal(lane.count, 1);
  assert.throws(() => take(2, 0), StreamError);
  assert.equal(lane.count, 1);
});

test("all at once at the end is told, one a second is not, nor a wait for the server", () => {
  const held = laneAt({ steps: 3 });
  held.lane.opened();
  for (const id of [0, 1, 2]) held.take(id, 2);
  held.lane.done("The body ended.");
  assert.match(held.lane.words, /^All at once, at the end/);

  const live = laneAt({ steps: 3 });
  live.lane.opened();
  for (const id of [0, 1, 2]) live.take(id, id + 0.01);
  live.lane.done("The body ended.");
  assert.match(live.lane.words, /^Done/);

  const waited = laneAt({ steps: 3, interval: 0 });
  waited.lane.lost("the connection ended");
  waited.clock.now = 4;
  waited.lane.opened();
  for (const id of [0, 1, 2]) waited.take(id, 4);
  waited.lane.done("The body ended.");
  assert.match(waited.lane.words, /^Done/);
});

test("however many events, the marks stay few and evenly spread, and the rows are the latest", () => {
  const marks = new Thinned(MAX_MARKS);
  for (let id = 0; id < 100_000; id++) marks.add({ id });
  const ids = marks.items.map(({ id }) => id);
  assert.ok(ids.length <= MAX_MARKS && ids.length > MAX_MARKS / 2);
  assert.deepEqual(new Set(ids.slice(1).map((id, i) => id - ids[i])), new Set([marks.stride]));
  const rows = new Tail(MAX_ROWS);
  for (let i = 0; i < 1000; i++) rows.add({});
  assert.equal(rows.count, 1000);
  assert.deepEqual(
    rows.latest.map(({ number }) => number),
    Array.from({ length: MAX_ROWS }, (_, i) => 1000 - MAX_ROWS + i),
  );
});

test("the axis ends after the stream, and stands still while nothing outgrows it", () => {
  assert.ok(axisEnd(9, 0) > 9 && axisEnd(9, 0) < 12);
  assert.equal(axisEnd(9, 10), axisEnd(9, 0));
  assert.ok(axisEnd(9, 60) > 60);
  assert.ok(axisEnd(99_999, 0) < 60);
  assert.equal(axisEnd(NaN, 0), 1);
  for (const end of [0.3, 1, 10.35, 77, 86_400]) {
    for (const max of [3, 5, 12]) {
      const found = ticks(end, max);
      assert.equal(found[0], 0);
      assert.ok(found.length >= 2 && found.length <= max + 1, `${end} ${max}: ${found}`);
      assert.ok(found.at(-1) <= end);
    }
  }
});
