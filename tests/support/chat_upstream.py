"""Servers of chat completions that fail: `uvicorn tests.support.chat_upstream:app`.

The model that is asked for says what happens.
"""

import asyncio
import gzip
import json

from starlette.types import Receive, Scope, Send


def chunk(text: str | None, reason: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


ONE, TWO, STOP, DONE = chunk("One"), chunk(" two"), chunk(None, "stop"), "data: [DONE]\n\n"
USAGE = 'data: {"choices": null, "usage": {"total_tokens": 5}}\n\ndata: {"choices": []}\n\n'
SSE, JSON = "text/event-stream", "application/json"
# By the model: the status, the media type, what is sent.
ANSWERS: dict[str, tuple[int, str, str]] = {
    "complete": (200, SSE, ONE + TWO + STOP + DONE),
    "comments, usage": (200, SSE, ": hi\n\n" + ONE + ": hi\n\n" + TWO + STOP + USAGE + DONE),
    "CRLF": (200, f"{SSE}; charset=utf-8", (ONE + TWO + STOP + DONE).replace("\n", "\r\n")),
    "no [DONE]": (200, SSE, ONE + TWO + STOP),
    "no reason": (200, SSE, ONE + TWO + DONE),
    "more after its end": (200, SSE, ONE + TWO + STOP + ONE + STOP + DONE),
    "gzip": (200, SSE, ONE + TWO + STOP + DONE),
    "half pairs": (200, SSE, chunk("\ud83d") + chunk("\ude00") + STOP),
    "length": (200, SSE, ONE + TWO + chunk(None, "length") + DONE),
    "filtered": (200, SSE, ONE + TWO + chunk(None, "content_filter") + DONE),
    "falls silent": (200, SSE, ONE + TWO),
    "breaks off": (200, SSE, ONE + TWO),
    "ends early": (200, SSE, ONE + TWO),
    "no JSON": (200, SSE, ONE + TWO + "data: {\n\n"),
    "a text": (200, SSE, ONE + TWO + 'data: "Enough."\n\n'),
    "null": (200, SSE, ONE + TWO + "data: null\n\n"),
    "strange choices": (200, SSE, ONE + TWO + 'data: {"choices": [5]}\n\n'),
    "strange text": (200, SSE, ONE + TWO + 'data: {"choices": [{"delta": {"content": 5}}]}\n\n'),
    "an error": (200, SSE, ONE + TWO + 'data: {"error": {"message": "Enough."}}\n\n'),
    "an error as text": (200, SSE, ONE + TWO + 'data: {"error": "Enough."}\n\n'),
    "an error, flat": (200, SSE, ONE + TWO + 'data: {"object": "error", "message": "Enough."}\n\n'),
    "200 with an error": (200, JSON, '{"error": {"message": "Enough."}}'),
    "200 in one piece": (200, JSON, '{"choices": [{"message": {"content": "One"}}]}'),
    "400": (400, JSON, '{"error": {"message": "Enough.", "code": "x"}}'),
    "403": (403, JSON, '{"error": {"message": "Enough."}}'),
    "detail": (422, JSON, '{"detail": [{"loc": ["body"], "msg": "Enough."}]}'),
    "a list": (429, JSON, '[{"error": {"message": "Enough."}}]'),
    "plain": (500, "text/plain", "Enough."),
    "HTML": (502, "text/html", "<h1>Enough.</h1>"),
    "empty": (500, "text/plain", ""),
    "moved": (302, "text/plain", "Enough."),
    "401": (401, JSON, '{"error": {"message": "Incorrect API key provided: the-key"}}'),
}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    body = b""
    while (message := await receive()).get("more_body") or message["body"]:
        body += message["body"]
        if not message.get("more_body"):
            break
    question = json.loads(body)
    print("asked:", dict(scope["headers"]).get(b"authorization"), json.dumps(question), flush=True)
    model = question["model"]
    status, kind, text = ANSWERS[model]
    data, headers = text.encode(), [(b"content-type", kind.encode())]
    if model == "gzip":
        data = gzip.compress(data)
        headers.append((b"content-encoding", b"gzip"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for start in range(0, len(data), 7):  # events are cut anywhere
        piece = data[start : start + 7]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)
    if model == "breaks off":
        raise ConnectionError("in the middle of the body")
    if model == "falls silent":
        while (await receive())["type"] != "http.disconnect":
            pass
        print("the reader has left", flush=True)
        return
    await send({"type": "http.response.body"})
