"""answers: an answer of a model that goes on while its reader is away.

It is the background mode of OpenAI's Responses API, which every `openai` package reads. Everybody
who has the id of an answer can read it, from any event on, and stop it. Take it where an answer
takes long or costs much. Where an answer may end with its connection, `tokens` is simpler.

Run it with `uvicorn recipes.answers:app --reload`, then open http://localhost:8000, or read it with

    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.responses.create(model="parrot", input="Hello!", background=True, stream=True)
    client.responses.retrieve("resp_…", stream=True, starting_after=5)

The answers are in the memory of one process. With `REDIS_URL` (redis://localhost:6379) they are in
Redis, for any number of servers: answers_store.py. The model is a parrot. With `UPSTREAM_URL`
(https://api.openai.com/v1) and `UPSTREAM_KEY` a server of chat completions is asked instead.

1. how an answer is made;
2. how it is read;
3. the endpoints.
"""

import asyncio
import json
import logging
import os
import re
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from main import HEADERS, EndStreams, Stream
from recipes.answers_model import UPSTREAM, Failure, Incomplete, Question, ask_parrot, ask_upstream
from recipes.answers_store import Answer, Answers, Away, RedisAnswers, Refused
from recipes.common import prepare

SILENCE = 10.0  # seconds; proxies cut a stream that is silent for 30 to 60
FINISH = 5.0  # seconds that a server which is asked to stop goes on with its answers
url = os.environ.get("REDIS_URL")
answers = RedisAnswers(url) if url else Answers()
logger = logging.getLogger("uvicorn.error")


# 1. How an answer is made -------------------------------------------------------------------------


def failed(message: str) -> dict[str, Any]:
    return {"status": "failed", "error": {"code": "server_error", "message": message}}


async def begin(question: Question) -> Answer:
    """Put the first event, and let the model make the rest."""
    answer = Answer(f"resp_{uuid4().hex}")
    response = {
        "id": answer.id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(question.background),
        "error": None,
        "incomplete_details": None,
        "instructions": question.instructions,
        "max_output_tokens": question.max_output_tokens,
        "metadata": question.metadata or {},
        "model": question.model,
        "output": [],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    }
    answer.add(answer.event("response.created", response=response))
    async with in_time():
        await answers.create(answer)
    answer.maker = asyncio.create_task(make(answer, question))
    return answer


async def make(answer: Answer, question: Question) -> None:
    """Put all other events, the last one whatever happens."""
    place = {"item_id": answer.item("")["id"], "output_index": 0, "content_index": 0}

    async def say(kind: str, **fields: Any) -> None:
        event = answer.event(f"response.{kind}", **fields)
        await insist(lambda: answers.put(answer, event))

    async def say_done(status: str) -> None:
        item = answer.item(status, answer.text())
        (part,) = item["content"]
        await say("output_text.done", **place, text=part["text"], logprobs=[])
        await say("content_part.done", **place, part=part)
        await say("output_item.done", output_index=0, item=item)

    end: dict[str, Any] = {"status": "completed"}
    try:
        await say("in_progress", response=answer.response())
        item = answer.item("in_progress")
        await say("output_item.added", output_index=0, item={**item, "content": []})
        await say("content_part.added", **place, part=item["content"][0])
        model = ask_upstream(question) if UPSTREAM else ask_parrot(question)
        try:
            async with aclosing(model) as texts:
                async for text in texts:
                    await say("output_text.delta", **place, delta=text, logprobs=[])
        except Incomplete as reason:
            end = {"status": "incomplete", "incomplete_details": {"reason": str(reason)}}
        await say_done(end["status"])
        await insist(lambda: answers.check(answer))
    except Refused:
        end = failed("The answer was ended elsewhere.")  # which is the end that it has already
    except asyncio.CancelledError:
        end = answer.stop
    except Failure as error:
        end = failed(str(error))
    except Exception:
        logger.exception("The model failed.")
        end = failed("The model failed.")
    await insist(lambda: answers.finish(answer, **end))
    answer.maker = None


async def insist(do: Callable[[], Awaitable[None]]) -> None:
    """Do it again until Redis takes it. Meanwhile the model waits."""
    while True:
        try:
            return await do()
        except Away:
            await asyncio.sleep(0.5)


# 2. How it is read --------------------------------------------------------------------------------


async def read(
    answer: Answer, after: int = -1, *, whole: bool = False, alone: bool = False
) -> AsyncGenerator[str]:
    """Yield the events after one as they come, or the whole response at its end.

    Alone: when this is closed, nobody reads any more, and the model stops. The first piece is
    empty: once that is taken, the `finally` here is sure to run.
    """
    answer.readers += 1
    try:
        yield ""
        place = bisect_right(answer.events, after, key=lambda event: event.number)
        while not answer.over or answer.events[place:]:
            news, events = answer.news, answer.events[place : place + 100]
            place += len(events)
            if events and not whole:
                yield "".join(
                    f"event: {e.type}\nid: {e.number}\ndata: {e.data}\n\n" for e in events
                )
            elif not events and not (await asyncio.wait([news], timeout=SILENCE))[0]:
                yield "\n" if whole else ": keep-alive\n\n"  # JSON may begin with line breaks
        if whole:
            yield json.dumps(answer.response())
    finally:
        answer.readers, answer.used = answer.readers - 1, time.monotonic()
        if alone and answer.maker:
            answer.maker.cancel()


# 3. The endpoints ---------------------------------------------------------------------------------


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    """Give up in time for an answer to the request."""
    try:
        async with asyncio.timeout(4):
            yield
    except TimeoutError as error:
        raise Away("no answer in time") from error


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with answers.running():
        yield
        makers = {answer.maker: answer for answer in answers.here.values() if answer.maker}
        if url and makers:  # only then somebody can still read them, on another server
            await asyncio.wait(makers, timeout=FINISH)
        for maker, answer in makers.items():
            answer.stop = failed("The server was stopped.")
            maker.cancel()
        if makers:
            await asyncio.wait(makers, timeout=2)


app = FastAPI(title="Answers", lifespan=lifespan)
prepare(app, page="answers.html")
app.add_middleware(EndStreams)
SSE = "text/event-stream"


def to_json(value: object) -> Response:
    # In ASCII: a text can hold half of a surrogate pair, and UTF-8 cannot.
    return Response(json.dumps(value), media_type="application/json")


async def find(response_id: str) -> Answer:
    known = re.fullmatch("resp_[0-9a-f]{32}", response_id)
    async with in_time():
        if known and (answer := await answers.look(response_id)):
            return answer
    raise failure(404, f"Response with id '{response_id}' not found.")


Found = Annotated[Answer, Depends(find)]


@app.post("/v1/responses", response_class=Response)
async def create(question: Question) -> Response:
    if not UPSTREAM and question.model != "parrot":
        message = f"The model `{question.model}` does not exist; `parrot` does."
        raise failure(404, message, param="model", code="model_not_found")
    answer = await begin(question)
    if question.background and not question.stream:
        return to_json(answer.response())
    frames = read(answer, whole=not question.stream, alone=not question.background)
    await anext(frames)
    return Stream(frames, media_type=SSE if question.stream else "application/json")


@app.get("/v1/responses/{response_id}", response_class=Response)
async def retrieve(
    answer: Found,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{0,18}$")] = None,
) -> Response:
    if not stream:
        return to_json(answer.response())
    after = int(last_event_id) if last_event_id else starting_after
    after = -1 if after is None else after
    if answer.over and after >= answer.events[-1].number:
        return Response(status_code=204, headers=HEADERS)
    return Stream(read(answer, after), media_type=SSE)


@app.post("/v1/responses/{response_id}/cancel", response_class=Response)
async def cancel(answer: Found) -> Response:
    async with in_time():
        await answers.finish(answer, status="cancelled")
    if answer.maker:
        answer.maker.cancel()
    return to_json(answer.response())


@app.delete("/v1/responses/{response_id}", response_class=Response)
async def delete(answer: Found) -> Response:
    async with in_time():
        await answers.delete(answer)
    if answer.maker:
        answer.maker.cancel()
    return to_json({"id": answer.id, "object": "response", "deleted": True})


# What is wrong, as this API tells it


def failure(status: int, message: str, **fields: str | None) -> HTTPException:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None, **fields}
    return HTTPException(status, {"error": error})


@app.exception_handler(StarletteHTTPException)
async def tell(_: Request, error: StarletteHTTPException) -> Response:
    detail: Any = error.detail  # FastAPI's own, such as that of a 405, is a text
    detail = failure(error.status_code, detail).detail if isinstance(detail, str) else detail
    return Response(json.dumps(detail), error.status_code, error.headers, "application/json")


@app.exception_handler(RequestValidationError)
async def tell_bad_input(request: Request, error: RequestValidationError) -> Response:
    """This API answers 400 where FastAPI answers 422."""
    first = error.errors()[0]
    message = f"{first['msg']} ({'.'.join(map(str, first['loc']))})"
    param = next((str(name) for name in first["loc"][1:2]), None)
    return await tell(request, failure(400, message, param=param))


@app.exception_handler(Away)
async def tell_away(request: Request, error: Away) -> Response:
    told = failure(503, "The answers cannot be read or written now. Try again.")
    told.headers = {"Retry-After": "1"}
    return await tell(request, told)
