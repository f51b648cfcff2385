"""relay: stands between your readers and a real server of the chat completions protocol.

It passes on bytes in both directions, without rules of its own. It adds three things: its key; a
comment after each 10 seconds of silence; an error if an answer is incomplete or not an answer.
Run it with `UPSTREAM_URL=https://api.openai.com/v1 UPSTREAM_KEY=… uvicorn recipes.relay:app`.
Without `UPSTREAM_URL` it relays `tokens`. Anybody who can reach it can use your key: see relay.md.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import Any

import httpx2
from fastapi import FastAPI, HTTPException, Request
from starlette.requests import ClientDisconnect
from starlette.types import Send

from main import EndStreams
from recipes.common import (
    LateStream,
    openai_error,
    prepare,
    upstream,
    upstream_error,
    use_openai_errors,
)
from recipes.parrot import serve_parrot

SILENCE = 10.0  # seconds; proxies cut a stream that is silent for 30 to 60
MAX_PART = 16 * 1024 * 1024  # bytes of an event, or of an answer that is not a stream
URL, KEY, client = upstream()
URL = URL or serve_parrot()
PASSED_ON = re.compile(  # headers, but no cookies or keys, and none that belong to one connection
    rb"accept|content-(type|encoding)|user-agent|http-referer|retry-after.*|idempotency-key|.*request-id"
    rb"|.*ratelimit-.*|trace(parent|state)|(x|openai)-(?!accel|forwarded|.*(key|token|auth)).*"
)
EVENT_END = re.compile(rb"(?<=\n\n)|(?<=\r\r)|(?<=\n\r\n)")  # a line ends with LF, CR or CRLF
FIELD = re.compile(rb"(?:^(?:\xef\xbb\xbf)?|[\r\n])(data|event|id|retry|): ?([^\r\n]*)")


def ends(part: bytes, is_stream: bool) -> bool:
    """Return whether this part completes the answer. Raises HTTPException if it is no answer."""
    fields = FIELD.findall(part)  # one with an empty name is a comment
    data = b"\n".join(value for name, value in fields if name == b"data") if is_stream else part
    if data.startswith(b"[DONE]"):
        return True
    try:
        text = data.decode("utf-8-sig", "replace").strip()  # a token may have half a character
        answer = json.loads(text or ("{}" if fields else ""))
        reasons = [choice.get("finish_reason") for choice in answer.get("choices") or []]
    except (ValueError, TypeError, AttributeError, RecursionError):  # not JSON, or another shape
        raise openai_error(502, "The upstream's answer is not of this protocol:", part) from None
    return any(reasons) or (is_stream and bool(answer.get("error")))


class Answer(LateStream):
    """The upstream's answer. Its status is sent with the first part: until then it can change."""

    def __init__(self, request: Request, path: str, question: bytes) -> None:
        super().__init__(())
        self.is_stream = False
        headers = [(k, v) for k, v in request.headers.raw if PASSED_ON.fullmatch(k)]
        headers += [(b"authorization", b"Bearer " + KEY.encode())] if KEY else []
        url = httpx2.URL(URL + path).copy_with(query=request.scope["query_string"] or None)
        self.asked = httpx2.Request(request.method, url, headers=headers, content=question)
        with suppress(ValueError, AttributeError, RecursionError):
            self.is_stream = bool(json.loads(question).get("stream"))

    async def stream_response(self, send: Send) -> None:
        self.send = send
        try:
            async with aclosing(self.parts()) as parts:
                await self.pass_on(parts)
        except (HTTPException, httpx2.HTTPError) as error:
            if not isinstance(error, HTTPException):
                error = upstream_error(error)
            if not self.begun:
                raise error from None
            await self.say(error)
        except asyncio.CancelledError:  # the server stops; or the reader has left
            if self.begun:
                await self.say(openai_error(503, "The server is stopping."))
            raise
        await self.say(b"", more=False)

    async def parts(self) -> AsyncGenerator[Any]:
        """Yield the response, then each event with its blank line, or the complete body at once."""
        async with aclosing(await client.send(self.asked, stream=True)) as response:
            yield response
            rest = b""
            async for piece in response.aiter_bytes():
                may_end = self.is_stream and re.search(rb"[\r\n]", piece)
                searched, rest = len(rest), rest + piece
                may_end = may_end and EVENT_END.search(rest, searched)
                *events, rest = EVENT_END.split(rest) if may_end else [rest]
                for event in filter(bytes.strip, events):
                    yield event
                if len(rest) > MAX_PART:
                    break
            yield rest + b"\n\n" if self.is_stream and rest.strip() else rest

    async def pass_on(self, parts: AsyncGenerator[Any]) -> None:
        """Pass on an answer as it arrives. Raises HTTPException if it is not complete."""
        response: httpx2.Response = await self.wait_for(anext(parts))
        status, method, failed = response.status_code, self.asked.method, not response.is_success
        if status == 401 or 300 <= status < 400:
            raise openai_error(502, f"UPSTREAM_URL or UPSTREAM_KEY is wrong: it answered {status}.")
        self.status_code = min(status, 599)
        head = [(k.lower(), v) for k, v in response.headers.raw if k.lower() != b"content-encoding"]
        self.raw_headers += [(k, v) for k, v in head if PASSED_ON.fullmatch(k)]
        is_stream = self.is_stream or b"text/event-stream" in dict(head).get(b"content-type", b"")
        self.is_stream = is_stream = is_stream and response.is_success
        complete, part = (failed and not self.begun) or method == "HEAD", b""
        try:
            while part := await self.wait_for(anext(parts, b"")):
                complete = complete or (not failed and ends(part, is_stream)) or method == "GET"
                if not (complete or is_stream):
                    break
                await self.say(part)
                if complete and is_stream and (b"data", b"[DONE]") in FIELD.findall(part):
                    break  # some upstreams keep the connection open
        except httpx2.HTTPError:
            if not (complete and is_stream):
                raise
        if not complete:
            why = f" answered {status}." if failed else "'s answer is not complete."
            raise openai_error(status if failed else 502, f"The upstream{why}", part)

    async def wait_for(self, coming: Awaitable[Any]) -> Any:
        """Await it, and send a comment after each 10 seconds of silence."""
        task = asyncio.ensure_future(coming)
        try:
            while not (await asyncio.wait([task], timeout=SILENCE))[0]:
                if self.is_stream:
                    self.headers.setdefault("content-type", "text/event-stream")
                    await self.say(b": keep-alive\n\n")
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def say(self, part: bytes | HTTPException, more: bool = True) -> None:
        if isinstance(part, HTTPException):
            part = b"data: %s\n\n" % json.dumps(part.detail).encode()
        if not self.begun:
            self.begun = True
            head = {"status": self.status_code, "headers": self.raw_headers}
            await self.send({"type": "http.response.start", **head})
        await self.send({"type": "http.response.body", "body": part, "more_body": more})


app = FastAPI(title="Relay")
prepare(app, page="tokens.html")
use_openai_errors(app)
app.add_middleware(EndStreams, methods=("POST",))  # as in `tokens`


@app.post("/v1/chat/completions")
@app.get("/v1/models")
@app.head("/v1/models", include_in_schema=False)
async def relay(request: Request) -> Answer:
    try:
        question = await request.body()
    except ClientDisconnect:  # in the log, it would be an error of this server
        raise openai_error(400, "The question is not complete.") from None
    return Answer(request, request.scope["route"].path.removeprefix("/v1"), question)
