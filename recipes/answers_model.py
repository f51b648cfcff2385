"""The models of the recipe `answers`: the parrot, and a server of chat completions."""

import json
import os
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import httpx2
from pydantic import BaseModel, Field

from recipes.parrot import parrot

UPSTREAM = (os.environ.get("UPSTREAM_URL") or "").rstrip("/")
KEY = os.environ.get("UPSTREAM_KEY") or ""
if UPSTREAM and not re.match("https?://[^/]", UPSTREAM):
    raise SystemExit("UPSTREAM_URL is not the address of a server: https://api.openai.com/v1")
STALLED = 300.0  # seconds without a byte; a model that thinks says nothing for minutes


class Part(BaseModel):
    type: Literal["input_text", "output_text"]
    text: str


class Message(BaseModel):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]

    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "\n".join(part.text for part in content)


class Question(BaseModel):
    model: str
    input: Annotated[str | list[Message], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    background: bool | None = None
    # These would change the answer, and cannot be had here.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    previous_response_id: None = None
    conversation: None = None

    def messages(self) -> list[Message]:
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        return self.input


class Incomplete(Exception):
    """The model ended early: the reason, as the API names it."""


class Failure(Exception):
    """The model failed: what its reader is told."""


async def ask_parrot(question: Question) -> AsyncGenerator[str]:
    """Yield the last message again."""
    made = 0
    async with aclosing(parrot(question.messages()[-1].text())) as tokens:
        async for token in tokens:
            if made == question.max_output_tokens:
                raise Incomplete("max_output_tokens")
            made += 1
            yield token


async def ask_upstream(question: Question) -> AsyncGenerator[str]:
    """Yield what a server of chat completions says, as it comes."""
    messages = [{"role": said.role, "content": said.text()} for said in question.messages()]
    if question.instructions:
        messages.insert(0, {"role": "system", "content": question.instructions})
    body = {"model": question.model, "messages": messages, "stream": True}
    if question.max_output_tokens:
        body["max_tokens"] = question.max_output_tokens
    headers = {"Content-Type": "application/json"}
    if KEY:
        headers["Authorization"] = f"Bearer {KEY}"
    client = httpx2.AsyncClient(timeout=httpx2.Timeout(STALLED, connect=5), headers=headers)
    url, reason = f"{UPSTREAM}/chat/completions", None
    try:
        async with client, client.stream("POST", url, content=json.dumps(body)) as said:
            stream = said.headers.get("Content-Type", "").startswith("text/event-stream")
            if said.status_code != 200 or not stream:
                raise Failure(in_its_words(said.status_code, await read_a_little(said)))
            async for event in httpx2.EventSource(said):
                if event.data == "[DONE]":
                    reason = reason or "stop"
                elif event.data:
                    chunk = json.loads(event.data)
                    if "choices" not in chunk:
                        raise Failure(in_its_words(200, event.data))
                    for choice in chunk["choices"] or []:
                        text = (choice.get("delta") or {}).get("content")
                        if text and isinstance(text, str):
                            yield text
                        reason = choice.get("finish_reason") or reason
    except httpx2.TimeoutException:
        raise Failure("The upstream has stalled.") from None
    except httpx2.HTTPError:
        if not reason:
            raise Failure("The connection to the upstream failed or broke.") from None
    except (ValueError, TypeError, AttributeError):
        raise Failure("The upstream's answer is not one of chat completions.") from None
    if not reason:
        raise Failure("The upstream broke off in the middle of its answer.")
    if early := {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reason):
        raise Incomplete(early)


async def read_a_little(response: httpx2.Response) -> str:
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > 10_000:
            break
    return body[:10_000].decode(errors="replace")


def in_its_words(status: int, said: Any) -> str:
    """Return what an upstream says of its failure, whatever its shape."""
    if status == 401:
        return "The upstream refuses the key of this server."
    try:
        said = json.loads(said)
        while isinstance(said, dict | list) and said:
            inner = said if isinstance(said, list) else [said[k] for k in NAMES if said.get(k)]
            said = inner[0]
    except (ValueError, RecursionError, LookupError):
        pass  # plain text, or none of these names
    return f"The upstream failed ({status}): {said}" if said else f"The upstream failed ({status})."


NAMES = ("error", "message", "detail", "msg")
