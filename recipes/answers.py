"""answers: a model's answer that continues while its reader is away.

It is the background mode of OpenAI's Responses API: anybody who has the id of an answer can read it
from any event, or stop it. Use it if an answer takes long or costs much. If an answer may end with
its connection, `tokens` is simpler.

Run it with `uvicorn recipes.answers:app --reload`, then open http://localhost:8000, or read it with
`OpenAI(base_url="http://localhost:8000/v1", api_key="none")` as in answers.md. The answers are in
the memory of one process. With `REDIS_URL` (redis://localhost:6379) they are in Redis, for any
number of servers: see answers_redis.py. The model is a parrot. With `UPSTREAM_URL`
(https://api.openai.com/v1) and `UPSTREAM_KEY` it is a server of chat completions instead.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Annotated, Any, Literal
from uuid import uuid4

import httpx2
from fastapi import Depends, FastAPI, Header, HTTPException, Query, Response
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from main import HEADERS, EndStreams, Stream
from recipes import common
from recipes.parrot import parrot, to_tokens

KEEP = 3600  # seconds that an answer is kept after its end
SILENCE = 10.0  # seconds; proxies cut a stream that is silent for 30 to 60
SSE = "text/event-stream"
Json = dict[str, Any]
URL, KEY, http = common.upstream()
http.follow_redirects = True  # as the openai package does
http.headers |= {"Content-Type": "application/json", "Authorization": f"Bearer {KEY or '-'}"}


# 1. The question, and the models ------------------------------------------------------------------
class Message(BaseModel):
    role: Literal["user", "assistant", "system", "developer"]
    content: common.Text


class Question(BaseModel):
    model: str
    input: Annotated[str | Annotated[list[Message], Field(fail_fast=True)], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    background: bool | None = False
    # These would change the answer, and are not supported here.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    previous_response_id: None = None
    conversation: None = None

    def messages(self) -> list[Any]:
        """Return the messages in the format of chat completions."""
        said = self.input
        said = said if isinstance(said, list) else [Message(role="user", content=said)]
        if self.instructions:
            said = [Message(role="system", content=self.instructions), *said]
        return [message.model_dump() for message in said]


# A model yields the parts of its answer: each piece of text as a `delta`, then how it ended.
Parts = AsyncGenerator[tuple[str, Any]]
EARLY = {"length": "max_output_tokens", "content_filter": "content_filter"}
BROKEN = {"abort", "error", "insufficient_system_resource", "model_length"}  # of vLLM and others


async def ask_parrot(question: Question) -> Parts:
    tokens = to_tokens(question.messages()[-1]["content"])
    limit = question.max_output_tokens or len(tokens)
    async with aclosing(parrot("".join(tokens[:limit]))) as said:
        async for token in said:
            yield "delta", token
    yield ("incomplete", EARLY["length"]) if limit < len(tokens) else ("completed", None)


async def ask_upstream(question: Question) -> Parts:
    limit = {"max_tokens": question.max_output_tokens} if question.max_output_tokens else {}
    asked = {"model": question.model, "messages": question.messages(), "stream": True, **limit}
    async with http.stream("POST", f"{URL}/chat/completions", content=json.dumps(asked)) as reply:
        if reply.status_code == 401:  # its message may contain a part of the key
            raise common.openai_error(502, "The upstream refuses the key of this server.")
        kind = reply.headers.get("Content-Type", SSE)
        if not reply.is_success or "json" in kind or "html" in kind:
            what = f"The upstream answered {reply.status_code}:"
            raise common.openai_error(502, what, await anext(reply.aiter_bytes(20_000), b""))
        reply.headers["Content-Type"] = SSE  # some servers send another one
        reply.encoding = "utf-8-sig"  # a byte order mark may come first
        async for event in httpx2.EventSource(reply, max_event_size=16_000_000):
            if event.data.startswith("[DONE]"):
                break
            chunk = json.loads(event.data or "{}")
            if chunk.get("error"):
                raise common.openai_error(502, "", event.data.encode())
            for choice in chunk.get("choices") or []:
                # Azure's filter sends choices without a delta. Mistral sends a thought as a list.
                if isinstance(text := (choice.get("delta") or {}).get("content"), str):
                    yield "delta", text
                if (why := choice.get("finish_reason")) and why not in BROKEN:
                    yield ("incomplete", EARLY[why]) if why in EARLY else ("completed", None)


# 2. An answer -------------------------------------------------------------------------------------
class Answer:
    """An answer, as far as this server knows it.

    It arrives in parts: a `response`, then each `delta` of its text, finally how it ended. The
    events that its readers get are made from these.
    """

    def __init__(self, response_id: str) -> None:
        self.id = response_id
        self.text: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.item: Json = {"id": f"msg{response_id[4:]}", "type": "message", "role": "assistant"}
        self.item |= {"status": "in_progress", "content": [self.text]}
        self.response: Json = {}  # as it stands now
        self.frames: list[str] = []  # its events, as its readers get them
        self.over = False
        self.news = asyncio.Event()
        self.maker: asyncio.Task[None] | None = None  # on the server that makes it

    def take(self, kind: str, value: Any) -> None:
        """Add the next part, and wake the readers."""
        if self.over:  # some models send more after their end
            return
        place = {"item_id": self.item["id"], "output_index": 0, "content_index": 0}
        if kind == "response":
            self.response = value
            self.add("created", response=value)
            self.add("in_progress", response=value)
            self.add("output_item.added", output_index=0, item={**self.item, "content": []})
            self.add("content_part.added", **place, part=self.text)
            self.response["output"] = [self.item]
        elif kind == "delta" and value:
            self.text["text"] += value
            self.add("output_text.delta", **place, delta=value, logprobs=[])
        elif kind != "delta" and self.response:
            self.over, self.response["status"] = True, kind
            self.item["status"] = "completed" if kind == "completed" else "incomplete"
            if kind in ("completed", "incomplete"):
                self.response["incomplete_details"] = value and {"reason": value}
                self.add("output_text.done", **place, text=self.text["text"], logprobs=[])
                self.add("content_part.done", **place, part=self.text)
                self.add("output_item.done", output_index=0, item=self.item)
            elif kind == "failed":
                self.response["error"] = {"code": "server_error", "message": value}
            # The API has no event for `cancelled`.
            self.add("incomplete" if kind == "cancelled" else kind, response=self.response)
            if self.maker:
                self.maker.cancel()  # whoever has ended it, the model stops
        self.news.set()
        self.news = asyncio.Event()

    def add(self, kind: str, **fields: Any) -> None:
        number, name = len(self.frames), f"response.{kind}"
        data = json.dumps({"type": name, "sequence_number": number, **fields})
        self.frames.append(f"event: {name}\nid: {number}\ndata: {data}\n\n")

    async def read(self, after: int = -1) -> AsyncGenerator[str]:
        """Yield the events after number `after`, as they arrive."""
        sent = after + 1
        while sent < len(self.frames) or not self.over:
            if sent >= len(self.frames):
                with suppress(TimeoutError):
                    async with asyncio.timeout(SILENCE):
                        await self.news.wait()
            frames = self.frames[sent : sent + 100]
            sent += len(frames)
            yield "".join(frames) or ": keep-alive\n"  # a blank line would be an event for openai

    async def wait(self) -> AsyncGenerator[str]:
        """Yield the response when complete, and a line break in each silence: JSON allows that."""
        async for frames in self.read():
            yield "\n" if frames.startswith(":") else ""
        yield json.dumps(self.response)


async def make(answer: Answer, question: Question) -> None:
    """Put the model's parts into the store. Whatever happens, the last part is an end."""
    why: Any = "The upstream broke off in the middle of its answer."
    try:
        async with aclosing((ask_upstream if URL else ask_parrot)(question)) as parts:
            async for kind, value in parts:
                await store.put(answer, kind, value)
    except (HTTPException, httpx2.HTTPError) as error:
        told: Any = error if isinstance(error, HTTPException) else common.upstream_error(error)
        why = told.detail["error"]
        why = why.get("message") or why if isinstance(why, dict) else why
    except Exception:
        common.logger.exception("The model failed.")
        why = "The model failed."
    await store.put(answer, "failed", str(why)[:2000])  # does nothing if it has ended


# 3. Where answers are kept ------------------------------------------------------------------------
class Store:
    """The answers in the memory of one process. Another store has the same methods."""

    lifespan: Any = None  # for FastAPI: what another store does in the background

    def __init__(self) -> None:
        self.here: dict[str, Answer] = {}

    async def begin(self, response: Json) -> Answer:
        """Return a new answer, which begins with this response."""
        answer = self.here[response["id"]] = Answer(response["id"])
        answer.take("response", response)
        return answer

    async def find(self, response_id: str) -> Answer | None:
        """Return an answer as it stands now, or None if there is none."""
        return self.here.get(response_id)

    async def put(self, answer: Answer, kind: str, value: Any = None) -> None:
        """Put the next part of an answer. After its end, this does nothing."""
        answer.take(kind, value)
        if answer.over:
            asyncio.get_running_loop().call_later(KEEP, self.here.pop, answer.id, None)

    async def delete(self, answer: Answer) -> None:
        """Forget an answer. If it is being made, its model stops."""
        await self.put(answer, "cancelled")
        self.here.pop(answer.id, None)


store = Store()
if url := os.environ.get("REDIS_URL"):
    import recipes.answers_redis  # here, because it imports what is above

    store = recipes.answers_redis.RedisStore(url)


# 4. The endpoints ---------------------------------------------------------------------------------
app = FastAPI(title="Answers", lifespan=store.lifespan, default_response_class=common.ASCIIResponse)
common.prepare(app, page="answers.html")
common.use_openai_errors(app)
app.add_middleware(EndStreams)


async def find(response_id: str) -> Answer:
    if answer := await store.find(response_id):
        return answer
    raise common.openai_error(404, f"Response with id '{response_id}' not found.")


Found = Annotated[Answer, Depends(find)]


@app.post("/v1/responses")
async def create(question: Question) -> Any:
    if not URL and question.model != "parrot":
        message = f"The model `{question.model}` does not exist; `parrot` does."
        raise common.openai_error(404, message, param="model", code="model_not_found")
    response = question.model_dump(exclude={"input", "stream"})
    response |= {"id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time())}
    response |= {"status": "in_progress", "output": [], "error": None, "incomplete_details": None}
    response |= {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
    answer = await store.begin(response)
    answer.maker = asyncio.create_task(make(answer, question))
    if question.background and not question.stream:
        return answer.response
    # Called when the stream has ended, or its reader has left.
    stop = None if question.background else BackgroundTask(store.put, answer, "cancelled")
    content, kind = (answer.read(), SSE) if question.stream else (answer.wait(), "application/json")
    return Stream(content, media_type=kind, background=stop)


@app.get("/v1/responses/{response_id}")
async def retrieve(
    answer: Found,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=0)] = -1,
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{0,18}$")] = None,
) -> Any:
    if not stream:
        return answer.response
    after = int(last_event_id or starting_after)
    if answer.over and after >= len(answer.frames) - 1:
        return Response(status_code=204, headers=HEADERS)
    return Stream(answer.read(after), media_type=SSE)


@app.post("/v1/responses/{response_id}/cancel")
async def cancel(answer: Found) -> Any:
    await store.put(answer, "cancelled")
    return (await find(answer.id)).response


@app.delete("/v1/responses/{response_id}")
async def delete(answer: Found) -> Any:
    await store.delete(answer)
    return {"id": answer.id, "object": "response", "deleted": True}
