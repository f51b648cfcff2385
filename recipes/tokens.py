"""tokens: an answer, token by token, over POST: the chat completions protocol of the OpenAI API.

Take it for a model that talks, or to stand between your readers and one: every client of that
protocol can read it. A reader whose connection breaks cannot go on where it was, but asks again;
for work that must not be lost take `long_task`.

Run it with `uvicorn recipes.tokens:app --reload`, then open http://localhost:8000, or read it with
`OpenAI(base_url="http://localhost:8000/v1", api_key="none")` of the `openai` package.

The model is a parrot, which needs no key. With `UPSTREAM_URL` (such as https://api.openai.com/v1)
and `UPSTREAM_KEY` a real one answers, and this server relays it.

1. the question, and what is answered when something is wrong;
2. the parrot;
3. the relay;
4. the answer, however it ends;
5. the endpoints.
"""

import asyncio
import json
import logging
import os
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import openai
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from main import HEADERS, PAGE_HEADERS, EndStreams, PageFiles

logger = logging.getLogger(__name__)


# 1. The question, and what is answered when something is wrong ------------------------------------


def to_json(value: object) -> bytes:
    """Compact JSON in UTF-8. Raises ValueError for what they cannot hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


class Part(BaseModel, extra="allow"):
    type: str
    text: str = ""


class ChatMessage(BaseModel, extra="allow"):
    role: str
    content: str | list[Part] | None = None

    def parts(self) -> list[Part]:
        if isinstance(self.content, list):
            return self.content
        return [Part(type="text", text=self.content or "")]


AtLeastOne = Annotated[int, Field(ge=1)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=4),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
]


class Question(BaseModel, extra="allow"):
    """The fields that the parrot knows. The relay passes on all that there are."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_completion_tokens: AtLeastOne | None = None
    max_tokens: AtLeastOne | None = None  # its older name
    stop: Stops | None = None
    n: AtLeastOne | None = None

    @model_validator(mode="before")
    @classmethod
    def check_json(cls, body: Any) -> Any:
        """Python's parser takes NaN, 1e400 and half a surrogate pair, and no other one does."""
        try:
            to_json(body)
        except (TypeError, ValueError, RecursionError) as error:  # TypeError: bytes, no JSON at all
            raise ValueError(f"This cannot be passed on as JSON: {error}") from error
        return body


class Problem(BaseModel):
    """What is wrong, as this API tells it: `{"error": …}` with a status, or as an event."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


def failure(status: int, message: str, **fields: str | None) -> HTTPException:
    """An exception that reaches the reader as a `Problem`."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return HTTPException(status, Problem(message=message, type=kind, **fields).model_dump())


def told(error: StarletteHTTPException) -> bytes:
    """What the reader gets. In ASCII: an upstream may say what UTF-8 cannot hold."""
    detail: Any = error.detail
    if isinstance(detail, str):  # FastAPI's own, such as a 404 or a 405
        detail = failure(error.status_code, detail).detail
    return json.dumps({"error": detail}).encode()


# 2. The parrot ------------------------------------------------------------------------------------

SECONDS_PER_TOKEN = 0.03
TEXT = """\
A token is a piece of text: a word, a part of a word, or a sign such as ☕.
A model makes one token at a time, and each token is sent **at once**, so you read while it writes.
A stream of tokens is a stream of events, and each event is a piece of text.
A model that nobody reads makes no token: press Stop, and the model stops at the next token.
A piece of text such as <b>bold</b> is a piece of text, and not a sign to the browser.
"""


def to_tokens(text: str) -> list[str]:
    return re.findall(r" ?\w+|\s|[^\w\s]", text)


def squawk(prompt: str) -> Generator[str]:
    """Yield tokens, each of which follows the two before it somewhere in TEXT: a Markov chain.

    The same prompt gives the same tokens, another one probably others.
    """
    followers: dict[tuple[str, ...], list[str]] = {}
    before: tuple[str, ...] = ()
    for token in [*to_tokens(TEXT), ""]:  # the empty one is the end
        followers.setdefault(before, []).append(token)
        before = (*before, token)[-2:]
    before, dice = (), random.Random(prompt)
    while token := dice.choice(followers[before]):
        yield token
        before = (*before, token)[-2:]


def held_back(text: str, stops: list[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop sequence."""
    lengths = range(len(text), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)


class Parrot:
    """A model like any other: one token after the other, and each takes a while."""

    async def models(self) -> bytes:
        model = {"id": "parrot", "object": "model", "created": 0, "owned_by": "recipes"}
        return to_json({"object": "list", "data": [model]})

    def read(self, question: Question) -> str:
        """Return the text of the messages, or refuse what a parrot cannot do."""
        if question.model != "parrot":
            message = f"The model `{question.model}` does not exist; `parrot` does."
            raise failure(404, message, param="model", code="model_not_found")
        parts = [part for message in question.messages for part in message.parts()]
        asked = {
            **(question.model_extra or {}),
            "n": (question.n or 1) > 1,
            "messages": any(part.type != "text" for part in parts),
        }
        for field in ("n", "messages", "tools", "functions", "response_format", "logprobs"):
            if asked.get(field) not in (None, False, [], {"type": "text"}):
                message = f"The parrot answers text with one text: `{field}` asks for more."
                raise failure(400, message, param=field, code="unsupported_parameter")
        return "\n".join(part.text for part in parts)

    async def chunks(self, question: Question) -> AsyncGenerator[dict[str, Any]]:
        """Yield the chunks of a stream: the role, the text, why it ends, and the usage."""
        prompt = self.read(question)
        limit = question.max_completion_tokens or question.max_tokens
        stops = question.stop or []
        answer = {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": question.model,
        }

        def chunk(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return {**answer, "choices": [choice], "usage": None}

        made, held, reason = 0, "", "stop"
        yield chunk({"role": "assistant", "content": ""})
        with closing(squawk(prompt)) as tokens:
            for token in tokens:
                if made == limit:
                    reason = "length"
                    break
                await asyncio.sleep(SECONDS_PER_TOKEN)
                made += 1
                held += token
                if found := [at for stop in stops if (at := held.find(stop)) >= 0]:
                    held = held[: min(found)]
                    break
                # What may be the beginning of a stop sequence waits for what follows.
                ready = len(held) - held_back(held, stops)
                if ready:
                    yield chunk({"content": held[:ready]})
                held = held[ready:]
        if held:
            yield chunk({"content": held})
        yield chunk({}, reason)
        read = len(to_tokens(prompt))
        usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        yield {**answer, "choices": [], "usage": usage}

    async def stream(self, question: Question) -> AsyncGenerator[bytes]:
        usage_too = (question.stream_options or {}).get("include_usage")
        async with aclosing(self.chunks(question)) as chunks:
            async for chunk in chunks:
                if chunk["choices"] or usage_too:
                    yield to_json(chunk)

    async def complete(self, question: Question) -> bytes:
        *deltas, end, usage = [chunk async for chunk in self.chunks(question)]
        content = "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas)
        message = {"role": "assistant", "content": content, "refusal": None}
        reason = end["choices"][0]["finish_reason"]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return to_json({**usage, "object": "chat.completion", "choices": [choice]})


# 3. The relay -------------------------------------------------------------------------------------

STALLED_AFTER = 300.0  # seconds without a byte; a model that thinks says nothing for minutes


def finished(answer: Any) -> set[int]:
    """Which choices of an answer, or of a chunk, say why they end. Raises for what is neither.

    Only that tells an answer from the beginning of one: a body can end properly too early, and of
    a `[DONE]` that did not come the package says nothing.
    """
    choices = answer["choices"] or []
    return {choice.get("index", 0) for choice in choices if choice.get("finish_reason")}


@contextmanager
def upstream_failures() -> Iterator[None]:
    """Tell whatever goes wrong with the upstream as this API tells it."""
    try:
        yield
    except openai.APITimeoutError as error:
        raise failure(504, "The upstream has stalled.") from error
    except openai.APIConnectionError as error:
        raise failure(502, "The connection to the upstream failed or broke.") from error
    except openai.APIError as error:
        raise passed_on(error) from error
    except Exception as error:
        logger.warning("the upstream's answer is none of this API: %r", error)
        raise failure(502, "The upstream's answer is none of this API.") from error


def passed_on(error: openai.APIError) -> HTTPException:
    """What the upstream says of its failure itself, with a status or in mid-stream."""
    status, headers = 502, {}
    if isinstance(error, openai.APIStatusError):
        status, retry_after = error.status_code, error.response.headers.get("retry-after")
        headers = {"Retry-After": retry_after} if retry_after else {}
    if status in (401, 403):  # it refuses this server's key, which is not the reader's
        return failure(502, "The upstream refuses the key of this server.")
    if status < 400:  # a redirection to nowhere
        return failure(502, f"The upstream answered {status}.")
    try:
        problem = Problem.model_validate(error.body)
    except ValidationError:
        return failure(status, f"The upstream failed ({status}) without saying why.")
    return HTTPException(status, problem.model_dump(), headers)


class Relay:
    """A real server of this protocol, asked by way of the `openai` package."""

    def __init__(self, url: str, key: str) -> None:
        # The reader's own client retries. Retries here would multiply with those, and keep a 429
        # from the one who has to slow down.
        timeout = openai.Timeout(STALLED_AFTER, connect=5)
        self.client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout)

    async def models(self) -> bytes:
        with upstream_failures():
            answer: Any = await self.client.get("/models", cast_to=object)
            return to_json({"object": "list", "data": answer["data"]})

    # Not `chat.completions.create`: what the upstream has of its own shall pass, both ways.

    async def complete(self, question: Question) -> bytes:
        body = question.model_dump(exclude_unset=True)
        with upstream_failures():
            answer = await self.client.post("/chat/completions", body=body, cast_to=object)
            text, ended = to_json(answer), finished(answer)
        self.check(question, ended)
        return text

    async def stream(self, question: Question) -> AsyncGenerator[bytes]:
        body = question.model_dump(exclude_unset=True)
        ended: set[int] = set()
        with upstream_failures():
            chunks = await self.client.post(
                "/chat/completions",
                body=body,
                cast_to=object,
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )
            async with chunks:
                async for chunk in chunks:
                    ended |= finished(chunk)
                    yield to_json(chunk)
        self.check(question, ended)

    def check(self, question: Question, ended: set[int]) -> None:
        if set(range(question.n or 1)) - ended:
            raise failure(502, "The upstream broke off in the middle of its answer.")


# 4. The answer, however it ends -------------------------------------------------------------------

SILENCE = 10.0  # seconds; proxies cut a stream that is silent for 30 to 60


def to_event(data: bytes) -> bytes:
    return b"data: %s\n\n" % data


async def to_sse(chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Yield each chunk as an event, a comment for each 10 seconds of silence, and `[DONE]`."""
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(chunks, b"[DONE]"))
            if not (await asyncio.wait([coming], timeout=SILENCE))[0]:
                yield b": keep-alive\n\n"
                continue
            chunk, coming = coming.result(), None
            yield to_event(chunk)
            if chunk == b"[DONE]":
                return
    finally:
        # The reader may have left: the model stops, wherever it is, and not when the garbage
        # collection comes to it.
        if coming and not coming.done():
            coming.cancel()
        else:
            await chunks.aclose()


class Answer(StreamingResponse):
    """A body that never looks whole when it is not.

    What fails before its first piece is told by a status, what fails later by an event. When the
    reader leaves, Starlette closes the generator. It does so too when `EndStreams` says that the
    reader has left, because the server stops: then there is somebody to be told.
    """

    half = False  # begun, and not ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)
        if self.half:
            stopping = failure(503, "The server is stopping.")
            await send({"type": "http.response.body", "body": to_event(told(stopping))})

    async def stream_response(self, send: Send) -> None:
        pieces: Any = self.body_iterator
        async with aclosing(pieces):
            piece = await anext(pieces)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self.half = True
            try:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except HTTPException as error:
                last = to_event(told(error))
                await send({"type": "http.response.body", "body": last, "more_body": True})
            await send({"type": "http.response.body"})
        self.half = False


async def whole(body: Awaitable[bytes]) -> AsyncGenerator[bytes]:
    yield await body


# 5. The endpoints ---------------------------------------------------------------------------------

PAGES = Path(__file__).resolve().parent / "pages"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.model = Parrot()
    url = os.environ.get("UPSTREAM_URL")
    if not url:
        yield
        return
    app.state.model = Relay(url, os.environ.get("UPSTREAM_KEY", "none"))
    async with app.state.model.client:
        yield


app = FastAPI(title="Tokens", lifespan=lifespan)
app.add_middleware(EndStreams)


@app.post(
    "/v1/chat/completions",
    response_class=Response,
    responses={"4XX": {"model": dict[str, Problem]}},
)
async def chat_completions(request: Request, question: Question) -> Answer:
    model: Parrot | Relay = request.app.state.model
    if question.stream:
        events = to_sse(model.stream(question))
        return Answer(events, headers=HEADERS, media_type="text/event-stream")
    return Answer(whole(model.complete(question)), media_type="application/json")


@app.get("/v1/models", response_class=Response)
async def models(request: Request) -> Answer:
    model: Parrot | Relay = request.app.state.model
    return Answer(whole(model.models()), media_type="application/json")


@app.exception_handler(StarletteHTTPException)
async def tell(_: Request, error: StarletteHTTPException) -> Response:
    return Response(told(error), error.status_code, error.headers, "application/json")


@app.exception_handler(RequestValidationError)
async def tell_bad_input(request: Request, error: RequestValidationError) -> Response:
    """This API answers 400 where FastAPI's habit is 422."""
    first = error.errors()[0]
    place = [str(name) for name in first["loc"]]
    message = f"{first['msg'].removeprefix('Value error, ')} ({'.'.join(place)})"
    param = place[1] if len(place) > 1 else None
    return await tell(request, failure(400, message, param=param))


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGES / "tokens.html", headers=PAGE_HEADERS)


app.mount("/pages", PageFiles(directory=PAGES))
