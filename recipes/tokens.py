"""tokens: an answer, token by token, over POST: the chat completions protocol of the OpenAI API.

Use it to serve a model of your own: every client of that protocol can read it. A reader whose
connection breaks has to ask again; if an answer must survive that, use `answers`. To put a server
in front of one that already speaks this protocol, use `relay`.

Run it with `uvicorn recipes.tokens:app --reload`, then open http://localhost:8000, or read it with
`OpenAI(base_url="http://localhost:8000/v1", api_key="none")` of the `openai` package. The model is
a parrot: it repeats the last message.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from secrets import token_hex
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, BeforeValidator, Field
from starlette.types import Send

from main import EndStreams, Stream
from recipes.common import Text, openai_error, prepare, use_openai_errors
from recipes.parrot import parrot, to_tokens

logger = logging.getLogger("uvicorn.error")

# 1. The question, and what the parrot makes of it -------------------------------------------------


class ChatMessage(BaseModel):
    role: str
    content: Text | None = None


AtLeastOne = Annotated[int, Field(ge=1)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=4),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
]


class Question(BaseModel):
    model: str
    # Stop at the first error: a body of 1 MB can have 500,000, and everybody else would wait.
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_completion_tokens: AtLeastOne | None = None
    max_tokens: AtLeastOne | None = None  # its older name
    stop: Stops | None = None
    # A parrot gives one answer, and uses no tools.
    n: Literal[1] | None = None
    tools: Annotated[list[Any] | None, Field(max_length=0)] = None


def plan(question: Question) -> tuple[str, str, dict[str, int]]:
    """Return the answer's text, why it ends, and the usage. A parrot knows all that in advance."""
    text = question.messages[-1].content or ""
    ends = [end for stop in question.stop or [] if (end := text.find(stop)) >= 0]
    tokens = to_tokens(text[: min(ends, default=None)])
    limit = question.max_completion_tokens or question.max_tokens or len(tokens)
    made = min(limit, len(tokens))
    read = sum(len(to_tokens(message.content or "")) for message in question.messages)
    usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
    return "".join(tokens[:made]), "stop" if made == len(tokens) else "length", usage


# 2. The answer, however it ends -------------------------------------------------------------------


def to_json(value: object) -> bytes:
    # In ASCII, because a text can contain half of a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(value, separators=(",", ":")).encode()


def to_event(value: object) -> bytes:
    return b"data: %s\n\n" % to_json(value)


def head(question: Question, kind: str) -> dict[str, Any]:
    id_ = f"chatcmpl-{token_hex(8)}"
    return {"id": id_, "object": kind, "created": int(time.time()), "model": question.model}


async def complete(question: Question) -> AsyncGenerator[bytes]:
    """Yield the answer as soon as it is complete."""
    text, reason, usage = plan(question)
    async with aclosing(parrot(text)) as tokens:
        content = "".join([token async for token in tokens])
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    yield to_json({**head(question, "chat.completion"), "choices": [choice], "usage": usage})


async def events(question: Question) -> AsyncGenerator[bytes]:
    """Yield the role, the text token by token, why it ends, the usage if asked for, and the end."""
    text, reason, usage = plan(question)
    common = head(question, "chat.completion.chunk")

    def chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return to_event({**common, "choices": [choice], "usage": None})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async with aclosing(parrot(text)) as tokens:
            async for token in tokens:
                yield chunk({"content": token})
        yield chunk({}, reason)
        if (question.stream_options or {}).get("include_usage"):
            yield to_event({**common, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"
    except Exception:
        logger.exception("The model failed in mid-answer.")
        yield to_event(openai_error(500, "The model failed.").detail)


class Answer(Stream):
    """Tells its reader when it ends early: half an answer must not look complete.

    For the `openai` package, the end of the body ends the answer, with or without `[DONE]`.
    """

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except asyncio.CancelledError:  # the server stops; or the reader has left
            event = to_event(openai_error(503, "The server is stopping.").detail)
            await send({"type": "http.response.body", "body": event, "more_body": True})
            raise


# 3. The endpoints ---------------------------------------------------------------------------------

app = FastAPI(title="Tokens")
prepare(app, page="tokens.html")
use_openai_errors(app)
# By default, the answer to a POST is not ended early. Here it may be: `Answer` sends an error.
app.add_middleware(EndStreams, methods=("POST",))


@app.post("/v1/chat/completions", response_class=Response)
async def chat_completions(question: Question) -> Stream:
    if question.model != "parrot":
        message = f"The model `{question.model}` does not exist; `parrot` does."
        raise openai_error(404, message, param="model", code="model_not_found")
    if question.stream:
        return Answer(events(question))
    # Also a Stream: it closes the generator when the reader leaves, so the model stops. FastAPI
    # would not cancel an ordinary endpoint.
    return Stream(complete(question), media_type="application/json")


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    model = {"id": "parrot", "object": "model", "created": 0, "owned_by": "recipes"}
    return {"object": "list", "data": [model]}
