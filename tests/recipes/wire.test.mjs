// recipes/pages/wire.js without a page. Run it with `node --test tests/recipes/wire.test.mjs`.
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { test } from "node:test";

import { Source } from "../../recipes/pages/wire.js";

const STREAM = { "Content-Type": "text/event-stream" };

/** Answers each request with the next of these functions; the last one answers all that follow. */
async function serve(t, ...answers) {
  const requests = [];
  const server = createServer((request, response) => {
    requests.push({ headers: request.headers, method: request.method, at: performance.now() });
    answers[Math.min(requests.length, answers.length) - 1](response, request);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return { requests, url: `http://127.0.0.1:${server.address().port}/` };
}

const body = (...pieces) =>
  async function (response) {
    response.writeHead(200, STREAM);
    for (const piece of pieces) {
      response.write(piece);
      await new Promise((resolve) => setTimeout(resolve, 20)); // each in a read of its own
    }
    response.end();
  };
const status =
  (code, headers = {}, text = "") =>
  (response) =>
    response.writeHead(code, headers).end(text);
const over = status(204);

/** Read until "over" or "failed"; return the events, the states and the last sentence. */
function read(t, url, options = {}) {
  return new Promise((resolve) => {
    const [events, states] = [[], []];
    const source = new Source(url, {
      onevent: (event) => events.push(event),
      onstate(state, sentence) {
        states.push(state);
        if (state === "over" || state === "failed") resolve({ events, states, sentence, source });
      },
      ...options,
    });
    t.after(() => source.close());
  });
}

const datas = ({ events }) => events.map(({ data }) => data);

test("lines, fields and comments are read as the standard has them", async (t) => {
  const { url } = await serve(
    t,
    body(
      "\ufeff: a comment\ndata: one\n\n",
      "data:two\r\ndata\r\ndata:  three\r\n\r\n",
      "id: 1\rdata: four\r\r",
      "\ndata: after a CR at the end of a piece\r",
      "\n\r",
      "\nevent: named\nunknown: x\ndata: five: 5\nData: no field\n\nevent: without data\n\n",
      "data: the type is forgotten\n\nid: a\0b\ndata\n\nid\ndata: no id\n\n",
      "data: not ended\n",
    ),
    over,
  );
  const { events } = await read(t, url);
  const message = (data, id = "1") => ({ type: "message", data, id });
  assert.deepEqual(events, [
    message("one", ""),
    message("two\n\n three", ""),
    message("four"),
    message("after a CR at the end of a piece"),
    { type: "named", data: "five: 5", id: "1" },
    message("the type is forgotten"),
    message(""),
    message("no id", ""),
  ]);
});

test("it makes no difference where a body is cut", async (t) => {
  const text = "id: é1\r\ndata: a\r\r\ndata: ☕\n\r\ndata: b\r\r";
  const bytes = new TextEncoder().encode(text);
  const expected = ["a", "☕", "b"];
  for (const size of [1, 2, 3, 5, bytes.length]) {
    const pieces = [];
    for (let at = 0; at < bytes.length; at += size) pieces.push(bytes.slice(at, at + size));
    const { url, requests } = await serve(t, body(...pieces), over);
    assert.deepEqual(datas(await read(t, url)), expected, `pieces of ${size}`);
    // As UTF-8, which a server reads as Latin-1.
    assert.equal(requests[1].headers["last-event-id"], "Ã©1");
  }
});

test("an end, a cut, a 5xx and no server: it goes on where it was, until a 204", async (t) => {
  const cut = (response) => {
    response.writeHead(200, STREAM);
    response.write("retry: 100\nid: 2\ndata: two\n\nid: 3\ndata: cut off\n", () =>
      setTimeout(() => response.destroy(), 20),
    );
  };
  const { url, requests } = await serve(
    t,
    body("retry: 100\nid: 1\ndata: one\n\nid: 1b\n\n"),
    cut,
    status(503),
    (response) => response.destroy(),
    body("data: three\n\n"),
    over,
  );
  const result = await read(t, url, { lastEventId: "0" });
  assert.deepEqual(datas(result), ["one", "two", "three"]);
  const ids = requests.map(({ headers }) => headers["last-event-id"]);
  assert.deepEqual(ids, ["0", "1b", "2", "2", "2", "2"]);
  assert.equal(result.states.at(-1), "over");
});

test("each failure makes the next pause longer, and what comes makes it short again", async (t) => {
  const bad = status(502);
  const good = body("data: x\n\n");
  const { url, requests } = await serve(t, body("retry: 100\n\n"), bad, bad, good, over);
  await read(t, url);
  const pauses = requests.slice(1).map(({ at }, i) => at - requests[i].at);
  for (const [i, least] of [100, 200, 400, 100].entries()) {
    assert.ok(pauses[i] >= least - 5, `pause ${i}: ${pauses[i]}`);
  }
  assert.ok(pauses[3] < 800, `a short one again: ${pauses[3]}`);
});

test("a server's Retry-After is kept", async (t) => {
  const { url, requests } = await serve(
    t,
    body("retry: 100\n\n"),
    status(503, { "Retry-After": "1" }),
    over,
  );
  await read(t, url);
  assert.ok(requests[2].at - requests[1].at >= 995);
});

test("a 4xx is final, and its reason is told", async (t) => {
  const json = { "Content-Type": "application/json" };
  for (const [text, sentence] of [
    ['{"detail": [{"msg": "Too large."}]}', "The server answered 422: Too large."],
    ['{"detail": "Not here"}', "The server answered 422: Not here."],
    ['{"error": {"message": "No such model."}}', "The server answered 422: No such model."],
    ["[]", "The server answered 422."],
    ["not JSON", "The server answered 422."],
  ]) {
    const { url, requests } = await serve(t, status(422, json, text));
    const result = await read(t, url);
    assert.deepEqual(result.states, ["connecting", "failed"]);
    assert.equal(result.sentence, sentence);
    assert.equal(requests.length, 1);
  }
});

test("an answer that is no stream of events is final", async (t) => {
  const { url } = await serve(t, status(200, { "Content-Type": "text/html" }, "data: x\n\n"));
  const { events, sentence } = await read(t, url);
  assert.deepEqual(events, []);
  assert.match(sentence, /text\/html/);
});

test("once only, over POST: an end is an end, and a cut is a failure", async (t) => {
  const init = { method: "POST", body: "{}", headers: { "Content-Type": "application/json" } };
  const whole = await serve(t, body("data: x\n\n"));
  const result = await read(t, whole.url, { init, reconnect: false });
  assert.deepEqual(result.states, ["connecting", "open", "over"]);
  const [{ method, headers }] = whole.requests;
  assert.equal(`${method} ${headers["content-type"]}`, "POST application/json");
  const cut = await serve(t, (response) => {
    response.writeHead(200, STREAM);
    response.write("data: x\n\n", () => setTimeout(() => response.destroy(), 20));
  });
  const { states, sentence } = await read(t, cut.url, { init, reconnect: false });
  assert.deepEqual(states, ["connecting", "open", "failed"]);
  assert.match(sentence, /broke off/);
});

test("a server that falls silent is left", async (t) => {
  const silent = (response) => {
    response.writeHead(200, STREAM);
    response.write("retry: 100\nid: 1\ndata: x\n\n");
  };
  const { url, requests } = await serve(t, silent, over);
  await read(t, url, { silence: 300 });
  assert.equal(requests[1].headers["last-event-id"], "1");
});

test("after close() nothing is called, not even for what has come already", async (t) => {
  const { url } = await serve(t, body("data: 1\n\ndata: 2\n\n"), over);
  const called = [];
  await new Promise((resolve) => {
    const source = new Source(url, {
      onevent({ data }) {
        called.push(data);
        source.close();
        setTimeout(resolve, 200);
      },
      onstate: (state) => called.push(state),
    });
  });
  assert.deepEqual(called, ["connecting", "open", "1"]);
});

test("an error of a handler is reported, and the stream goes on", async (t) => {
  const reported = [];
  globalThis.reportError = (error) => reported.push(error.message);
  t.after(() => delete globalThis.reportError);
  const { url } = await serve(t, body("data: 1\n\ndata: 2\n\n"), over);
  await read(t, url, { onevent: ({ data }) => assert.fail(data) });
  assert.deepEqual(reported, ["1", "2"]);
});
