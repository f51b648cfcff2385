"""answers: an answer of a model that goes on while its reader is away.

It is the background mode of OpenAI's Responses API. Everybody who has the id of an answer can read
it, from any event on, and stop it. Take it where an answer takes long or costs much. Where an
answer may end with its connection, `tokens` is simpler.

Run it with `uvicorn recipes.answers:app --reload`, then open http://localhost:8000, or read it with

    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.responses.create(model="parrot", input="Hello!", background=True, stream=True)
    client.responses.retrieve("resp_…", stream=True, starting_after=5)

The answers are in the memory of one process. With `REDIS_URL` (redis://localhost:6379) they are in
Redis, for any number of servers. The model is a parrot. With `UPSTREAM_URL` and `UPSTREAM_KEY`
(https://api.openai.com/v1) a server of chat completions is asked instead.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Literal
from uuid import uuid4

import httpx2
from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, Field
from redis.exceptions import RedisError, ResponseError
from starlette.background import BackgroundTask

from main import HEADERS, EndStreams, Stream
from recipes import common
from recipes.parrot import parrot, to_tokens

KEEP = 3600  # seconds that an answer is kept after its end
SILENCE = 10.0  # seconds; proxies cut a stream that is silent for 30 to 60
STALLED = 300.0  # seconds without a byte; a model that thinks says nothing for minutes
FINISH = 5.0  # seconds that a server which is asked to stop goes on with its answers
SSE = "text/event-stream"
URL, KEY = common.upstream()


# 1. The question, and the models ------------------------------------------------------------------
class Part(BaseModel):
    type: Literal["input_text", "output_text"]
    text: str


class Message(BaseModel):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]

    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "\n".join(part.text for part in content)


def to_messages(said: object) -> object:
    return [{"role": "user", "content": said}] if said and isinstance(said, str) else said


class Question(BaseModel):
    model: str
    input: Annotated[list[Message], Field(min_length=1), BeforeValidator(to_messages)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    background: bool | None = None
    # These would change the answer, and cannot be had here.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    previous_response_id: None = None
    conversation: None = None


async def ask_parrot(question: Question) -> AsyncGenerator[tuple[str, str | None]]:
    """Yield the last message again, and why it ends early, if it does."""
    tokens = to_tokens(question.input[-1].text())
    limit = question.max_output_tokens or len(tokens)
    async with aclosing(parrot("".join(tokens[:limit]))) as said:
        async for token in said:
            yield token, None
    yield "", "max_output_tokens" if limit < len(tokens) else None


async def ask_upstream(question: Question) -> AsyncGenerator[tuple[str, str | None]]:
    """Yield what a server of chat completions says, and why it ends early, if it does."""
    messages = [{"role": message.role, "content": message.text()} for message in question.input]
    if question.instructions:
        messages.insert(0, {"role": "system", "content": question.instructions})
    body = {"model": question.model, "messages": messages, "stream": True}
    if question.max_output_tokens:
        body["max_tokens"] = question.max_output_tokens
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {KEY}"} if KEY else {}
    client = httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(STALLED, connect=5))
    url, reason = f"{URL}/chat/completions", None
    try:
        async with client, client.stream("POST", url, content=json.dumps(body)) as answer:
            if answer.status_code == 401:  # what it says may repeat a part of the key
                raise common.openai_error(502, "The upstream refuses the key of this server.")
            if answer.status_code != 200 or SSE not in answer.headers.get("Content-Type", ""):
                said = await anext(answer.aiter_bytes(10_000), b"")
                raise common.openai_error(502, f"The upstream answered {answer.status_code}.", said)
            async for event in httpx2.EventSource(answer):
                text, why = read_chunk(event.data)
                reason = reason or why
                yield text, None
    except httpx2.HTTPError as error:
        if not reason:
            raise common.upstream_error(error) from None
    if not reason:
        raise common.openai_error(502, "The upstream broke off in the middle of its answer.")
    early = {"length": "max_output_tokens", "content_filter": "content_filter"}
    yield "", early.get(reason)


def read_chunk(data: str) -> tuple[str, str | None]:
    """Return the text in a chunk, and why the answer ends with it, if it does."""
    if data in ("", "[DONE]"):
        return "", "stop" if data else None
    try:
        choice = (json.loads(data)["choices"] or [{}])[0]
        text = (choice.get("delta") or {}).get("content")
        return text if isinstance(text, str) else "", choice.get("finish_reason")
    except (ValueError, TypeError, LookupError, AttributeError):
        raise common.openai_error(502, "The upstream failed:", data.encode()) from None


# 2. An answer is a list of events -----------------------------------------------------------------
class Answer:
    """The events of an answer, as far as this server knows them."""

    def __init__(self, response_id: str) -> None:
        self.id, self.key = response_id, f"answers:{response_id}"
        self.events: list[dict[str, Any]] = []
        self.end: dict[str, Any] = {}  # its status at its end, and the reason
        self.news = asyncio.Event()
        self.maker: asyncio.Task[None] | None = None  # on the server that makes it
        self.missed = 0  # signs of life, in a row

    async def stop(self) -> None:
        if self.maker:
            self.maker.cancel()

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return what would be the next event."""
        return {"type": f"response.{kind}", "sequence_number": len(self.events), **fields}

    def text(self) -> str:
        return "".join(event.get("delta", "") for event in self.events)

    def item(self, status: str, text: str = "") -> dict[str, Any]:
        """Return the one item of the output: a message."""
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        message = {"id": self.id.replace("resp", "msg"), "type": "message", "role": "assistant"}
        return {**message, "status": status, "content": [part]}

    def response(self) -> dict[str, Any]:
        """Return the response as it stands now."""
        status = self.end.get("status", "in_progress")
        known = status if status in ("in_progress", "completed") else "incomplete"
        output = [self.item(known, self.text())] if len(self.events) > 2 else []
        return {**self.events[0]["response"], "output": output, **self.end}

    def take(self, event: dict[str, Any]) -> None:
        """Take in the next event, or the end, and wake the readers.

        What comes after a hole has to wait. An end has a number only if its server knows it.
        """
        number = len(self.events)
        if self.end or event.get("sequence_number", number or None) != number:
            return
        if "end" in event:
            self.end = event["end"]
            status = self.end["status"]  # the API has no event of its own for `cancelled`
            kind = "incomplete" if status == "cancelled" else status
            event = self.event(kind, response=self.response())
            if self.maker:
                self.maker.cancel()  # whoever has ended it, the model stops
            wait = 0 if redis else KEEP
            asyncio.get_running_loop().call_later(wait, here.pop, self.id, None)
        self.events.append(event)
        self.news.set()
        self.news = asyncio.Event()


# In memory, all answers. With Redis, those that are being made, if this server makes or reads them.
here: dict[str, Answer] = {}


# 3. Redis -----------------------------------------------------------------------------------------
#
# An answer is a stream. The id of an event is its number: the first is 0-1. The id of the end is
# 1-0, so that any server can put it without knowing how many events there are. Redis refuses an id
# that is not higher than all before it (https://redis.io/docs/latest/commands/xadd/). So there is
# one end, and nothing after it: the server that makes the answer is refused, and stops its model.
END = "1-0"
CONNECTIONS = 2  # and one that waits for events, and one for the signs of life
PATIENCE = 2.0  # seconds that Redis has for an answer
BEAT, LIFE = 1.5, 4000  # seconds between two signs of life; milliseconds that one lasts
turns = asyncio.Semaphore(CONNECTIONS)
redis: Any = None
if url := os.environ.get("REDIS_URL"):
    redis = common.connect_to_redis(url, CONNECTIONS, retries=1)
    listener, heart = (common.connect_to_redis(url, 1, retries=1) for _ in range(2))


async def put(answer: Answer, event: dict[str, Any]) -> None:
    """Put the next event, or the end. If this raises, it may be there or not: put it again."""
    if answer.end or not redis:
        answer.take(event)
        return
    is_end, number = "end" in event, event.get("sequence_number", len(answer.events))
    entry, fields = END if is_end else f"0-{number + 1}", {"event": json.dumps(event)}
    try:
        async with asyncio.timeout(PATIENCE), turns, redis.pipeline(transaction=False) as pipeline:
            pipeline.xadd(answer.key, fields, entry, nomkstream=number > 0)
            if is_end or number % 20 == 0:  # now and then: is all there that should be?
                pipeline.xlen(answer.key)
                pipeline.expire(answer.key, KEEP)
                pipeline.set(f"alive:{answer.id}", 1, px=LIFE)
            added, *length = await pipeline.execute()
    except ResponseError as error:
        if "equal or smaller" not in str(error):
            raise
        await load(answer)  # it is over; or this is there, from a try whose result was lost
        return
    if not added or (length and length[0] <= number):
        await restore(answer, fields)
        await put(answer, event)
    elif is_end:
        await load(answer)  # which knows its number
    else:
        answer.take(event)


async def load(*answers: Answer) -> None:
    """Take in what Redis has and this server has not."""
    if redis:
        async with asyncio.timeout(PATIENCE), turns, redis.pipeline(transaction=False) as pipeline:
            for answer in answers:
                pipeline.xrange(answer.key, f"(0-{len(answer.events)}")
            found = await pipeline.execute()
        for answer, entries in zip(answers, found, strict=True):
            for _, fields in entries:
                if "event" in fields:
                    answer.take(json.loads(fields["event"]))


async def restore(answer: Answer, newest: dict[str, str]) -> None:
    """Put all events but the newest again: Redis came back without some, as after a failover."""

    async def put_all(pipeline: Any) -> None:  # if the stream changes meanwhile, this runs again
        ends = await pipeline.xrange(answer.key, END)
        pipeline.multi()
        if all(fields == newest for _, fields in ends):  # nobody else has ended it
            pipeline.delete(answer.key)
            for number, event in enumerate(answer.events, 1):
                pipeline.xadd(answer.key, {"event": json.dumps(event)}, f"0-{number}")
            pipeline.expire(answer.key, KEEP)

    async with asyncio.timeout(PATIENCE), turns:
        await redis.transaction(put_all, answer.key)


async def follow() -> None:
    """Wait for what other servers put: events, and the ends of what is made here."""
    # After the highest number that an event can have, only the end comes.
    streams = {a.key: f"0-{2**64 - 1 if a.maker else len(a.events)}" for a in here.values()}
    streams["answers:none"] = "0"  # which never comes; there must be one to wait for
    async with asyncio.timeout(PATIENCE):
        await listener.persist("answers:none")  # a write, so that a replica says what it is
        news = await listener.xread(streams, count=1, block=100)
    await load(*[answer for key, _ in news if (answer := here.get(key.removeprefix("answers:")))])
    await asyncio.sleep(0.01)  # many come at once then, for less CPU


async def beat() -> None:
    """Give a sign of life of all answers that are made here; look for that of all others."""
    answers = list(here.values())
    async with asyncio.timeout(PATIENCE), heart.pipeline(transaction=False) as pipeline:
        for answer in answers:
            # The second changes nothing. It is a write, because a replica would not refuse to read.
            how = {"px": LIFE} if answer.maker else {"xx": True, "keepttl": True}
            pipeline.set(f"alive:{answer.id}", 1, **how)
        signs = await pipeline.execute()
    for answer, sign in zip(answers, signs, strict=True):
        answer.missed = 0 if sign else answer.missed + 1
        if answer.missed > 2:
            end = failed("The server that made it is gone.")
            await put(answer, end)
            answer.take(end)  # also if Redis has an end of it, but not all before that
    await asyncio.sleep(BEAT)


# 4. How an answer is made -------------------------------------------------------------------------
def failed(message: object) -> dict[str, Any]:
    error = {"code": "server_error", "message": str(message)}
    return {"end": {"status": "failed", "error": error}}


async def make(answer: Answer, question: Question) -> None:
    """Put all other events, the last one whatever happens."""
    place = {"item_id": answer.item("")["id"], "output_index": 0, "content_index": 0}

    async def insist(event: dict[str, Any]) -> None:
        while not answer.end:
            try:
                await put(answer, event)
                break
            except (RedisError, TimeoutError):  # while Redis is away, the model waits
                await asyncio.sleep(0.5)

    async def say(kind: str, **fields: Any) -> None:
        await insist(answer.event(kind, **fields))

    status, details = "completed", None
    try:
        await say("in_progress", response=answer.response())
        item = answer.item("in_progress")
        await say("output_item.added", output_index=0, item={**item, "content": []})
        await say("content_part.added", **place, part=item["content"][0])
        async with aclosing((ask_upstream if URL else ask_parrot)(question)) as texts:
            async for text, early in texts:
                if text:
                    await say("output_text.delta", **place, delta=text, logprobs=[])
                if early:
                    status, details = "incomplete", {"reason": early}
        item = answer.item(status, answer.text())
        await say("output_text.done", **place, text=answer.text(), logprobs=[])
        await say("content_part.done", **place, part=item["content"][0])
        await say("output_item.done", output_index=0, item=item)
        end = {"status": status, "incomplete_details": details}
        last = {"sequence_number": len(answer.events), "end": end}
    except asyncio.CancelledError as why:
        last = failed(why) if why.args else {"end": {"status": "cancelled"}}
    except HTTPException as why:  # the upstream's failure, in its words
        said: Any = why.detail
        said = said["error"]
        last = failed(said.get("message") or said if isinstance(said, dict) else said)
    except Exception:
        common.logger.exception("The model failed.")
        last = failed("The model failed.")
    await insist(last)


# 5. How it is read --------------------------------------------------------------------------------
async def read(answer: Answer, after: int = -1) -> AsyncGenerator[str]:
    """Yield the events after one, as they come."""
    sent = after + 1
    while True:
        if events := answer.events[sent : sent + 100]:
            sent += len(events)
            yield "".join(map(to_sse, events))
        elif answer.end:
            return
        else:
            try:
                async with asyncio.timeout(SILENCE):
                    await answer.news.wait()
            except TimeoutError:
                yield ": keep-alive\n\n"


def to_sse(event: dict[str, Any]) -> str:
    number, data = event["sequence_number"], json.dumps(event, separators=(",", ":"))
    return f"event: {event['type']}\nid: {number}\ndata: {data}\n\n"


async def wait_for(answer: Answer) -> AsyncGenerator[str]:
    """Yield the response at its end. JSON may begin with line breaks: here, one in each silence."""
    async with aclosing(read(answer)) as frames:
        async for frame in frames:
            yield "\n" if frame.startswith(":") else ""
    yield json.dumps(answer.response())


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """With Redis: run what runs in the background; at the end, end what is made here."""
    work = {"reading answers": follow, "a sign of life": beat} if redis else {}
    tasks = [asyncio.create_task(common.keep_going(what, work[what], 0.5)) for what in work]
    yield
    if redis and (makers := {answer.maker for answer in here.values() if answer.maker}):
        await asyncio.wait(makers, timeout=FINISH)
        for maker in makers:
            maker.cancel("The server was stopped.")
        await asyncio.wait(makers, timeout=2)
    for task in tasks:
        task.cancel()


app = FastAPI(title="Answers", lifespan=lifespan, default_response_class=common.ASCIIResponse)
common.prepare(app, page="answers.html")
common.use_openai_errors(app)
app.add_middleware(EndStreams)


@app.exception_handler(TimeoutError)
@app.exception_handler(RedisError)
async def tell_away(_: Request, __: Exception) -> Response:
    error = common.openai_error(503, "The answers cannot be read or written now. Try again.")
    return common.ASCIIResponse(error.detail, 503, error.headers)


async def find(response_id: str) -> Answer:
    answer = here.get(response_id) or Answer(response_id)
    await load(answer)
    if not answer.events:
        raise common.openai_error(404, f"Response with id '{response_id}' not found.")
    return answer if answer.end else here.setdefault(response_id, answer)


Found = Annotated[Answer, Depends(find)]


@app.post("/v1/responses")
async def create(question: Question) -> Any:
    if not URL and question.model != "parrot":
        message = f"The model `{question.model}` does not exist; `parrot` does."
        raise common.openai_error(404, message, param="model", code="model_not_found")
    answer = Answer(f"resp_{uuid4().hex}")
    response = {"id": answer.id, "object": "response", "created_at": int(time.time())}
    response |= question.model_dump(include={"model", "instructions", "max_output_tokens"})
    response |= {"background": bool(question.background), "metadata": question.metadata or {}}
    response |= {"status": "in_progress", "output": [], "error": None, "incomplete_details": None}
    response |= {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
    await put(answer, answer.event("created", response=response))
    here[answer.id] = answer
    answer.maker = asyncio.create_task(make(answer, question))
    if question.background and not question.stream:
        return answer.response()
    # This is called when the stream has ended, or its reader has left.
    stop = None if question.background else BackgroundTask(answer.stop)
    if question.stream:
        return Stream(read(answer), media_type=SSE, background=stop)
    return Stream(wait_for(answer), media_type="application/json", background=stop)


@app.get("/v1/responses/{response_id}")
async def retrieve(
    answer: Found,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=0)] = -1,
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{0,18}$")] = None,
) -> Any:
    if not stream:
        return answer.response()
    after = int(last_event_id or starting_after)
    if answer.end and after >= len(answer.events) - 1:
        return Response(status_code=204, headers=HEADERS)
    return Stream(read(answer, after), media_type=SSE)


@app.post("/v1/responses/{response_id}/cancel")
async def cancel(answer: Found) -> Any:
    await put(answer, {"end": {"status": "cancelled"}})
    return answer.response()


@app.delete("/v1/responses/{response_id}")
async def delete(answer: Found) -> Any:
    await put(answer, {"end": {"status": "cancelled"}})
    if redis:  # its end stays, and keeps the server that makes it from putting anything again
        async with asyncio.timeout(PATIENCE), turns:
            await redis.xtrim(answer.key, maxlen=1, approximate=False)
    here.pop(answer.id, None)
    return {"id": answer.id, "object": "response", "deleted": True}
