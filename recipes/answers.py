"""answers: an answer of a model that goes on while its reader is away.

It is the background mode of OpenAI's Responses API, which every `openai` package reads. Everybody
who has the id of an answer can read it, from any event on, and stop it. Take it where an answer
takes long or costs much. Where an answer may end with its connection, `tokens` is simpler.

Run it with `uvicorn recipes.answers:app --reload`, then open http://localhost:8000, or read it with

    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.responses.create(model="parrot", input="Hello!", background=True, stream=True)
    client.responses.retrieve("resp_…", stream=True, starting_after=5)

The answers are in the memory of one process. With `REDIS_URL` (redis://localhost:6379) they are in
Redis, for any number of servers. The model is a parrot. With `UPSTREAM_URL`
(https://api.openai.com/v1) and `UPSTREAM_KEY` a server of chat completions is asked instead.
"""

import asyncio
import json
import os
import re
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Literal, NamedTuple
from uuid import uuid4

import httpx2
from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, Field
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from main import HEADERS, EndStreams, Stream
from recipes.common import keep_going, logger, openai_error, prepare, use_openai_errors
from recipes.parrot import parrot, to_tokens

KEEP = 3600  # seconds that an answer is kept after its end
SILENCE = 10.0  # seconds; proxies cut a stream that is silent for 30 to 60
STALLED = 300.0  # seconds without a byte; a model that thinks says nothing for minutes
FINISH = 5.0  # seconds that a server which is asked to stop goes on with its answers
BEAT, LIFE = 1.5, 3.5  # seconds between two signs of life, and that one lasts in Redis
PATIENCE = 3  # seconds until a connection to Redis that does not answer is given up
UPSTREAM = (os.environ.get("UPSTREAM_URL") or "").rstrip("/")
KEY = os.environ.get("UPSTREAM_KEY") or ""
if UPSTREAM and not re.match("https?://[^/]", UPSTREAM):
    raise SystemExit("UPSTREAM_URL is not the address of a server: https://api.openai.com/v1")


# 1. The question, and the models ------------------------------------------------------------------


class Part(BaseModel):
    type: Literal["input_text", "output_text"]
    text: str


def to_messages(said: object) -> object:
    return [{"role": "user", "content": said}] if said and isinstance(said, str) else said


class Message(BaseModel):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]

    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "\n".join(part.text for part in content)


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
    messages = [{"role": said.role, "content": said.text()} for said in question.input]
    if question.instructions:
        messages.insert(0, {"role": "system", "content": question.instructions})
    body = {"model": question.model, "messages": messages, "stream": True}
    if question.max_output_tokens:
        body["max_tokens"] = question.max_output_tokens
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {KEY}"} if KEY else {}
    client = httpx2.AsyncClient(timeout=httpx2.Timeout(STALLED, connect=5), headers=headers)
    url, reason = f"{UPSTREAM}/chat/completions", None
    failure = "The upstream broke off in the middle of its answer."
    try:
        async with client, client.stream("POST", url, content=json.dumps(body)) as answer:
            kind, status = answer.headers.get("Content-Type", ""), answer.status_code
            if status == 401:  # what it says may repeat a part of the key
                raise openai_error(502, "The upstream refuses the key of this server.")
            if status != 200 or not kind.startswith("text/event-stream"):
                said = await anext(answer.aiter_bytes(10_000), b"")
                raise openai_error(502, f"The upstream failed ({status}).", said)
            async for event in httpx2.EventSource(answer):
                if event.data == "[DONE]":
                    reason = reason or "stop"
                elif event.data:
                    chunk = json.loads(event.data)
                    if "choices" not in chunk:
                        raise openai_error(502, "The upstream failed:", event.data.encode())
                    for choice in chunk["choices"] or []:
                        text = (choice.get("delta") or {}).get("content")
                        if text and isinstance(text, str):
                            yield text, None
                        reason = choice.get("finish_reason") or reason
    except httpx2.TimeoutException:
        failure = "The upstream has stalled."
    except httpx2.HTTPError:
        failure = "The connection to the upstream failed or broke."
    except (ValueError, TypeError, AttributeError):
        failure = "The upstream's answer is not one of chat completions."
    if not reason:
        raise openai_error(502, failure)
    early = {"length": "max_output_tokens", "content_filter": "content_filter"}
    yield "", early.get(reason)


# 2. An answer is a list of events -----------------------------------------------------------------

ENDS = ("response.completed", "response.incomplete", "response.failed")
DELETED = 2**64 - 2  # the number of an event after which Redis takes no other


class Event(NamedTuple):
    number: int
    type: str
    data: str  # JSON


class Answer:
    """The events of an answer, as far as this server knows them."""

    def __init__(self, response_id: str) -> None:
        self.id = response_id
        self.key = f"answers:{response_id}"  # in Redis
        self.events: list[Event] = []
        self.newest = -1  # the highest number that is taken, perhaps by an event that is not here
        self.over = False
        self.news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.maker: asyncio.Task[None] | None = None  # on the server that makes it
        self.missed = 0  # how often in a row its maker gave no sign of life

    def event(self, kind: str, **fields: Any) -> Event:
        """Return what would be the next event."""
        data = {"type": kind, "sequence_number": self.newest + 1, **fields}
        return Event(self.newest + 1, kind, json.dumps(data, separators=(",", ":")))

    def end(self, status: str, **fields: Any) -> Event:
        """Return what would be the last event. The API has no type of its own for `cancelled`."""
        kind = "incomplete" if status == "cancelled" else status
        return self.event(f"response.{kind}", response=self.response(status, **fields))

    def add(self, event: Event) -> None:
        """Take in the next event, and wake the readers.

        After a hole only the end of an answer that is not complete is taken in: what is missing
        still comes, or never.
        """
        self.newest = max(self.newest, event.number)
        last = self.events[-1].number if self.events else -1
        fits = event.number == last + 1 or (event.number > last and event.type in ENDS[1:])
        if not fits or self.over:
            return
        self.events.append(event)
        loop, news = self.news.get_loop(), self.news
        self.news = loop.create_future()
        news.set_result(None)
        self.over = event.type in ENDS
        if self.over:
            loop.call_later(15 if redis else KEEP, here.pop, self.id, None)
            if self.maker:
                self.maker.cancel()  # whoever has ended it, the model stops

    def add_entries(self, entries: Any) -> None:
        """Take in what Redis has."""
        for entry, fields in entries:
            number = int(entry.partition("-")[2]) - 1
            if number == DELETED and self.events:
                self.add(self.end("cancelled"))
                self.newest = DELETED
            elif "data" in fields:
                self.add(Event(number, fields["type"], fields["data"]))

    def text(self) -> str:
        deltas = (json.loads(e.data) for e in self.events if e.type == "response.output_text.delta")
        return "".join(delta["delta"] for delta in deltas)

    def item(self, status: str, text: str = "") -> dict[str, Any]:
        """Return the one item of its output: a message."""
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        status = status if status in ("in_progress", "completed") else "incomplete"
        message = {"id": self.id.replace("resp", "msg"), "type": "message", "role": "assistant"}
        return {**message, "status": status, "content": [part]}

    def response(self, status: str = "in_progress", **fields: Any) -> dict[str, Any]:
        """Return the response as it stands now, or as it would end."""
        response: dict[str, Any] = json.loads(self.events[-1 if self.over else 0].data)["response"]
        if self.over:
            return response
        output = [self.item(status, self.text())] if len(self.events) > 2 else []
        return {**response, "status": status, "output": output, **fields}


# 3. Where the answers are -------------------------------------------------------------------------
#
# In Redis an answer is a stream, and the id of an event is its number. Redis refuses an id that is
# not higher than all before it (https://redis.io/docs/latest/commands/xadd/). So any server ends
# an answer by putting its last event; the server that makes it is refused then, and stops. It takes
# neither a lock nor a script.


def connect(url: str) -> Any:
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=2,  # one waits for events, one does all else
            timeout=None,
            socket_timeout=PATIENCE,
            retry=Retry(NoBackoff(), 0),  # whoever asks knows whether to ask again
            protocol=2,  # with 3 a connection that broke is not noticed before its use
            decode_responses=True,
            encoding_errors="replace",
        )
        pool.make_connection()  # type: ignore[no-untyped-call]
    except Exception:  # what it says may contain a part of the password
        example = "redis://[user:password@]host[:port][/database]"
        raise SystemExit(f"REDIS_URL is not the address of a Redis server: {example}") from None
    return Redis.from_pool(pool)


redis_url = os.environ.get("REDIS_URL")
redis: Any = connect(redis_url) if redis_url else None
here: dict[str, Answer] = {}  # with Redis: what is made here, and copies of what is read here
asked: asyncio.Queue[tuple[tuple[Any, ...], asyncio.Future[Any]]] = asyncio.Queue()


class Refused(Exception):
    """Somebody else was quicker to put this event, or the answer is over."""


async def ask(*command: Any) -> Any:
    """Send a command to Redis. Raises RedisError."""
    result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    asked.put_nowait((command, result))
    try:
        async with asyncio.timeout(PATIENCE):
            return await result
    except TimeoutError:
        raise RedisError("Redis did not answer in time.") from None


async def send() -> None:
    """Send all commands that wait, in one round trip."""
    batch = [await asked.get()]
    while not asked.empty():
        batch.append(asked.get_nowait())
    batch = [(command, future) for command, future in batch if not future.done()]
    pipeline = redis.pipeline(transaction=False)
    for command, _ in batch:
        pipeline.execute_command(*command)
    try:
        results = await pipeline.execute(raise_on_error=False)
    except Exception as error:
        results = [RedisError(str(error))] * len(batch)
    for (_, future), result in zip(batch, results, strict=True):
        if isinstance(result, Exception) and not future.done():
            future.set_exception(result)
        elif not future.done():
            future.set_result(result)
    if any(isinstance(result, ReadOnlyError) for result in results):
        await redis.connection_pool.disconnect()  # another one may be behind the same address now


async def put(answer: Answer, event: Event) -> None:
    """Put the next event. Raises `Refused`, and RedisError."""
    if answer.over:
        raise Refused
    if redis:
        entry, new = f"0-{event.number + 1}", [] if event.number == 0 else ["NOMKSTREAM"]
        fields = ("type", event.type, "data", event.data)
        try:
            if not await ask("XADD", answer.key, *new, entry, *fields) and answer.maker:
                raise RedisError("Redis has lost the answer.")  # until it is restored
        except ResponseError as error:
            if "equal or smaller" not in str(error):
                raise
            # Perhaps it is there from a try before, whose result did not get here.
            there = await ask("XRANGE", answer.key, entry, entry)
            if not there or there[0][1].get("data") != event.data:
                raise Refused from None
    answer.add(event)


async def look(response_id: str) -> Answer | None:
    """Return an answer as it stands now."""
    answer = here.get(response_id)
    if redis:
        answer = answer or Answer(response_id)
        answer.add_entries(await ask("XRANGE", answer.key, f"(0-{len(answer.events)}", "0"))
        known = answer.events and answer.newest != DELETED
        answer = here.setdefault(response_id, answer) if known else None
    return answer


async def finish(answer: Answer, **end: Any) -> None:
    """Put the last event, if there is none yet. Any server can end any answer."""
    while not answer.over:
        try:
            await put(answer, answer.end(**end))
        except Refused:
            await look(answer.id)


async def follow() -> None:
    """Read what is made elsewhere and read here, as long as one connection holds."""
    async with redis.client() as connection:
        while True:
            known = {a.key: f"0-{len(a.events)}" for a in here.values() if not (a.over or a.maker)}
            known["answers:none"] = "0"  # which never comes: there must be one to wait for
            for key, entries in await connection.xread(known, block=100):
                if answer := here.get(key.removeprefix("answers:")):
                    answer.add_entries(entries)
            await asyncio.sleep(0.01)  # many come at once then, for less CPU


async def beat() -> None:
    await asyncio.gather(*map(attend, list(here.values())))
    await asyncio.sleep(BEAT)


async def attend(answer: Answer) -> None:
    """Give a sign of life of an answer that is made here; look for that of one made elsewhere."""
    alive, known = f"{answer.key}:alive", len(answer.events)
    missed, answer.missed = answer.missed, 0  # if Redis fails, nobody can give one
    if answer.maker:
        life = ask("SET", alive, 1, "PX", int(LIFE * 1000))
        await asyncio.gather(life, ask("EXPIRE", answer.key, KEEP))
        there = await ask("XLEN", answer.key)
        if there < known:
            await restore(answer)
        elif there > known:
            await look(answer.id)
    elif not answer.over and not await ask("GET", alive):
        answer.missed = missed + 1
        if answer.missed == 3:
            await finish(answer, **failed("The server that made it is gone."))


async def restore(answer: Answer) -> None:
    """Put all events again: Redis has come back without some of them, as after a failover."""

    async def put_all(pipeline: Any) -> None:
        there, mine = await pipeline.xrange(answer.key), {event.data for event in answer.events}
        pipeline.multi()
        if all(fields.get("data") in mine for _, fields in there):  # nobody else has ended it
            pipeline.delete(answer.key)
            for number, kind, data in answer.events:
                pipeline.xadd(answer.key, {"type": kind, "data": data}, id=f"0-{number + 1}")
            pipeline.expire(answer.key, KEEP)

    await redis.transaction(put_all, answer.key)


# 4. How an answer is made -------------------------------------------------------------------------


def failed(message: object) -> dict[str, Any]:
    return {"status": "failed", "error": {"code": "server_error", "message": str(message)}}


async def make(answer: Answer, question: Question) -> None:
    """Put all other events, the last one whatever happens."""
    place = {"item_id": answer.item("")["id"], "output_index": 0, "content_index": 0}

    async def say(kind: str, **fields: Any) -> None:
        event = answer.event(f"response.{kind}", **fields)
        await insist(lambda: put(answer, event))

    end: dict[str, Any] = {"status": "completed"}
    try:
        await say("in_progress", response=answer.response())
        item = answer.item("in_progress")
        await say("output_item.added", output_index=0, item={**item, "content": []})
        await say("content_part.added", **place, part=item["content"][0])
        async with aclosing((ask_upstream if UPSTREAM else ask_parrot)(question)) as texts:
            async for text, early in texts:
                if text:
                    await say("output_text.delta", **place, delta=text, logprobs=[])
                if early:
                    end = {"status": "incomplete", "incomplete_details": {"reason": early}}
        item = answer.item(end["status"], answer.text())
        (part,) = item["content"]
        await say("output_text.done", **place, text=part["text"], logprobs=[])
        await say("content_part.done", **place, part=part)
        await say("output_item.done", output_index=0, item=item)
    except Refused:
        end = failed("The answer was ended elsewhere.")  # which is the end that it has already
    except asyncio.CancelledError as why:
        end = failed(why) if why.args else {"status": "cancelled"}
    except HTTPException as why:  # the upstream's failure, in its words
        said: Any = why.detail
        said = said["error"]
        end = failed(said.get("message") or said if isinstance(said, dict) else said)
    except Exception:
        logger.exception("The model failed.")
        end = failed("The model failed.")
    await insist(lambda: finish(answer, **end))


async def insist(do: Callable[[], Awaitable[None]]) -> None:
    """Do it again until Redis takes it. Meanwhile the model waits."""
    while True:
        try:
            return await do()
        except RedisError:
            await asyncio.sleep(0.5)


# 5. How it is read --------------------------------------------------------------------------------


async def read(
    answer: Answer, after: int = -1, *, whole: bool = False, alone: bool = False
) -> AsyncGenerator[str]:
    """Yield the events after one as they come, or the whole response at its end.

    Alone: when this is closed, nobody reads any more, and the model stops. The first piece is
    empty: once that is taken, the `finally` here is sure to run.
    """
    try:
        yield ""
        while True:
            news, start = answer.news, bisect_right(answer.events, after, key=lambda e: e.number)
            if events := answer.events[start : start + 100]:
                after = events[-1].number
                frames = [f"event: {e.type}\nid: {e.number}\ndata: {e.data}\n\n" for e in events]
                yield "" if whole else "".join(frames)
            elif answer.over:
                break
            elif not (await asyncio.wait([news], timeout=SILENCE))[0]:
                yield "\n" if whole else ": keep-alive\n\n"  # JSON may begin with line breaks
        if whole:
            yield json.dumps(answer.response())
    finally:
        if alone and answer.maker:
            answer.maker.cancel()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """With Redis: run what runs in the background; at the end, end what is made here."""
    work = {"asking Redis": send, "reading answers": follow, "a sign of life": beat}
    tasks = [asyncio.create_task(keep_going(what, work[what], 0.5)) for what in work if redis]
    yield
    if redis and (makers := {answer.maker for answer in here.values() if answer.maker}):
        await asyncio.wait(makers, timeout=FINISH)
        for maker in makers:
            maker.cancel("The server was stopped.")
        await asyncio.wait(makers, timeout=2)
    for task in tasks:
        task.cancel()


app = FastAPI(title="Answers", lifespan=lifespan)
prepare(app, page="answers.html")
use_openai_errors(app)
app.add_middleware(EndStreams)
SSE = "text/event-stream"


def to_json(value: object, status: int = 200, headers: Any = None) -> Response:
    # In ASCII: a text can hold half of a surrogate pair, and UTF-8 cannot.
    return Response(json.dumps(value), status, headers, "application/json")


@app.exception_handler(RedisError)
async def tell_away(_: Request, __: RedisError) -> Response:
    error = openai_error(503, "The answers cannot be read or written now. Try again.")
    return to_json(error.detail, 503, error.headers)


async def find(response_id: str) -> Answer:
    if re.fullmatch("resp_[0-9a-f]{32}", response_id) and (answer := await look(response_id)):
        return answer
    raise openai_error(404, f"Response with id '{response_id}' not found.")


Found = Annotated[Answer, Depends(find)]


@app.post("/v1/responses", response_class=Response)
async def create(question: Question) -> Response:
    if not UPSTREAM and question.model != "parrot":
        message = f"The model `{question.model}` does not exist; `parrot` does."
        raise openai_error(404, message, param="model", code="model_not_found")
    answer = Answer(f"resp_{uuid4().hex}")
    response = {"id": answer.id, "object": "response", "created_at": int(time.time())}
    response |= question.model_dump(include={"model", "instructions", "max_output_tokens"})
    response |= {"background": bool(question.background), "metadata": question.metadata or {}}
    response |= {"status": "in_progress", "output": [], "error": None, "incomplete_details": None}
    response |= {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
    first = put(answer, answer.event("response.created", response=response))
    # Together: if this server dies now, or is told nothing, Redis still forgets the event.
    await asyncio.gather(first, *([ask("EXPIRE", answer.key, KEEP)] if redis else []))
    here[answer.id] = answer
    answer.maker = asyncio.create_task(make(answer, question))
    if question.background and not question.stream:
        return to_json(answer.response())
    frames = read(answer, whole=not question.stream, alone=not question.background)
    await anext(frames)
    return Stream(frames, media_type=SSE if question.stream else "application/json")


@app.get("/v1/responses/{response_id}", response_class=Response)
async def retrieve(
    answer: Found,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=0)] = -1,
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{0,18}$")] = None,
) -> Response:
    if not stream:
        return to_json(answer.response())
    after = int(last_event_id or starting_after)
    if answer.over and after >= answer.events[-1].number:
        return Response(status_code=204, headers=HEADERS)
    return Stream(read(answer, after), media_type=SSE)


@app.post("/v1/responses/{response_id}/cancel", response_class=Response)
async def cancel(answer: Found) -> Response:
    await finish(answer, status="cancelled")
    return to_json(answer.response())


@app.delete("/v1/responses/{response_id}", response_class=Response)
async def delete(answer: Found) -> Response:
    if redis:  # one last entry keeps the maker from putting the others there again
        entry = f"0-{DELETED + 1}"
        await ask("XADD", answer.key, "NOMKSTREAM", entry, "deleted", "1")
        await asyncio.gather(ask("XTRIM", answer.key, "MAXLEN", 1), ask("EXPIRE", answer.key, KEEP))
    answer.add(answer.end("cancelled"))
    here.pop(answer.id, None)
    return to_json({"id": answer.id, "object": "response", "deleted": True})
