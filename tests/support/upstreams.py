"""What a relay of the recipe `tokens` may meet: `uvicorn tests.support.upstreams:upstream`."""

import asyncio
import json

from starlette.types import Receive, Scope, Send


def chunk(delta: dict[str, str], reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return json.dumps({"id": "x", "created": 0, "model": "x", "choices": [choice], "own": "☕"})


def completion(reason: str | None) -> str:
    message = {"role": "assistant", "content": "One two"}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return json.dumps({"id": "x", "created": 0, "model": "x", "choices": [choice], "own": "☕"})


BEGINNING = [chunk({"role": "assistant"}), chunk({"content": "One"}), chunk({"content": " two"})]
ERROR = {"message": "Too much.", "type": "tokens", "param": None, "code": "slow_down"}

# Upstreams by what they do: the events of a stream.
STREAMS: dict[str, list[str]] = {
    "is whole": [*BEGINNING, chunk({}, "stop"), "[DONE]"],
    "thinks": [*BEGINNING, chunk({}, "stop"), "[DONE]"],
    "ends at its limit": [*BEGINNING, chunk({}, "length"), "[DONE]"],
    "ends early": BEGINNING,
    "says [DONE] early": [*BEGINNING, "[DONE]"],
    "falls silent": BEGINNING,
    "breaks off": BEGINNING,
    "sends an error": [*BEGINNING, json.dumps({"error": ERROR})],
    "sends an error in no UTF-8": [*BEGINNING, '{"error": {"message": "upstream \\ud800"}}'],
    "sends a strange error": [*BEGINNING, '{"error": [1]}'],
    "sends half of JSON": [*BEGINNING, '{"choices": '],
    "sends another shape": [*BEGINNING, '{"hello": 1}'],
    "sends a text": [*BEGINNING, '"hello"'],
    "sends null": [*BEGINNING, "null"],
    "sends no number": [*BEGINNING, '{"choices": [], "x": NaN}'],
    "sends half a character": [*BEGINNING, '{"choices": [], "x": "\\ud800"}'],
    "sends nothing": [],
}
# The same without a stream: the body.
BODIES: dict[str, str] = {
    "is whole": completion("stop"),
    "ends early": completion(None),
    "breaks off": completion("stop"),
    "sends half of JSON": '{"choices": ',
    "sends another shape": '{"hello": 1}',
    "sends a text": '"hello"',
    "sends null": "null",
    "sends no number": '{"choices": [{"index": 0, "finish_reason": "stop"}], "x": NaN}',
    "sends half a character": '{"choices": [{"index": 0, "finish_reason": "\\ud800"}]}',
    "sends nothing": "",
}
# Whatever was asked: status, media type and body.
REFUSALS: dict[str, tuple[int, str, str]] = {
    "answers 429": (429, "application/json", json.dumps({"error": ERROR})),
    "answers 400": (400, "application/json", json.dumps({"error": ERROR})),
    "answers 500": (500, "application/json", json.dumps({"error": ERROR})),
    "answers 500 in HTML": (500, "text/html", "<h1>500</h1>"),
    "answers 503 in another shape": (503, "application/json", '{"detail": "busy"}'),
    "answers 401": (401, "application/json", json.dumps({"error": ERROR})),
    "answers 302 to nowhere": (302, "text/html", ""),
    "answers in HTML": (200, "text/html", "<h1>Welcome</h1>"),
    "answers an error with 200": (200, "application/json", json.dumps({"error": ERROR})),
}


async def upstream(scope: Scope, receive: Receive, send: Send) -> None:
    """What a relay may meet. The model's name says what is wrong; it prints what happens."""
    assert scope["type"] == "http"
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break

    async def begin(status: int, media_type: str, **headers: str) -> None:
        headers |= {"content-type": media_type, "retry-after": "7"}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    async def say(text: str, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

    async def wait_until_the_reader_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        print(f"{fault}: the reader has left", flush=True)

    if scope["path"] == "/v1/models":
        models = [{"id": fault, "object": "model"} for fault in [*STREAMS, *REFUSALS]]
        await begin(200, "application/json")
        await say(json.dumps({"object": "list", "data": models}), more=False)
        return
    question = json.loads(body) if body else {"model": "answers in HTML"}
    fault = question["model"]
    print(f"{fault}: asked with {dict(scope['headers'])[b'authorization'].decode()}", flush=True)
    print(f"{fault}: {json.dumps(question, sort_keys=True)}", flush=True)
    if fault == "is silent":
        await wait_until_the_reader_leaves()
    elif fault in REFUSALS:
        status, media_type, text = REFUSALS[fault]
        await begin(status, media_type)
        await say(text, more=False)
    elif question.get("stream"):
        await begin(200, "text/event-stream")
        if fault == "talks for ever":
            left = asyncio.create_task(wait_until_the_reader_leaves())
            while not left.done():
                await say(f"data: {chunk({'content': 'x' * 100_000})}\n\n")
                # To a reader who has left, uvicorn sends without giving way to anybody.
                await asyncio.sleep(0)
            return
        for data in STREAMS[fault]:
            if fault == "thinks":
                await asyncio.sleep(0.3)
            await say(f"data: {data}\n\n")
        if fault == "falls silent":
            await wait_until_the_reader_leaves()
        elif fault == "breaks off":
            raise ConnectionError("in the middle of the body")
        await say("", more=False)
    else:
        text = BODIES[fault]
        await begin(200, "application/json", **{"content-length": str(len(text.encode()))})
        if fault == "breaks off":
            await say(text[:20])
            raise ConnectionError("in the middle of the body")
        await say(text, more=False)
