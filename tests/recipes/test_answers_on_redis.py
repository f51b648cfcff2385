"""The recipe `answers` on Redis: two servers, and a Redis that fails in every way."""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.faults import answers as faults
from tests.support.answers import Ask, asked, events_of, text_of, words
from tests.support.processes import LIMIT, ROOT, Process, need, wait_for
from tests.support.redis_server import BadLine, RedisServer, running_redis

FAULTS = {fault.name: fault for fault in faults.FAULTS}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    with Ask(tmp_path) as ask:
        yield ask


@pytest.mark.parametrize(
    "name",
    [
        "`kill -9` of a server",
        "Redis killed, started again (`appendfsync always`)",
        "the line from a server to Redis falls silent",
        "another Redis is there, an empty one",
        "in memory: readers leave and come back",
    ],
)
def test_a_fault(name: str) -> None:
    need("redis-server", "redis-server")
    seen = faults.run(FAULTS[name], 4, 4, tokens=300)
    assert seen.events
    assert (seen.lost, seen.doubled, seen.disordered, seen.waiting) == (0, 0, 0, 0)
    assert seen.completed + seen.failed == 4
    if "server" not in name or "line" in name:
        assert not seen.failed  # the model and its server were well all the time


def test_the_table_is_of_what_answers_py_does() -> None:
    section = (ROOT / "tests/README.md").read_text().partition("<!-- faults of answers -->\n")[2]
    head, line, *rows = section.partition("\n\n")[0].splitlines()
    assert f"{head}\n{line}" == faults.HEAD
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == list(FAULTS)
    assert {tuple(row[3:7]) for row in cells} == {("0", "0", "0", "0")}


def test_any_server_reads_stops_and_forgets(ask: Ask, redis: RedisServer) -> None:
    servers = [ask.serve(redis.port) for _ in range(2)]
    here, there = (asked(server) for server in servers)
    for end in (there.responses.cancel, there.responses.delete):
        response = here.responses.create(model="parrot", input=words(5000), background=True)
        came: list[Any] = []
        for event in there.responses.retrieve(response.id, stream=True):
            came.append(event)
            if event.sequence_number == 20:
                end(response.id)
        assert [event.sequence_number for event in came] == list(range(len(came)))
        assert came[-1].response.status == "cancelled"
        assert came[-1].response.output_text == text_of(came)
    # Both models have stopped, on the server that was not asked to.
    servers[0].wait_for_log("the parrot stopped after", 2)
    with pytest.raises(openai.NotFoundError):
        here.responses.retrieve(response.id)
    assert words(5)[:20] not in str(redis.client.xrange(f"answers:{response.id}"))


def test_a_silent_model_is_stopped_from_elsewhere(ask: Ask, redis: RedisServer) -> None:
    constants = {"parrot.SECONDS_PER_TOKEN": 600}
    servers = [ask.serve(redis.port, constants=constants) for _ in range(2)]
    here, there = (asked(server) for server in servers)
    response = here.responses.create(model="parrot", input="a", background=True)
    servers[0].wait_for_log("the parrot begins")  # before that there is no model to be stopped
    assert there.responses.cancel(response.id).status == "cancelled"
    servers[0].wait_for_log("the parrot stopped after 0 of 1")
    assert here.responses.retrieve(response.id).status == "cancelled"


def test_asked_without_a_stream_whether_a_dead_server_still_makes_it(
    ask: Ask, redis: RedisServer
) -> None:
    servers = [ask.serve(redis.port) for _ in range(2)]
    here, there = (asked(server) for server in servers)
    response = here.responses.create(model="parrot", input=words(5000), background=True)
    servers[0].kill()
    killed = time.monotonic()
    wait_for(lambda: there.responses.retrieve(response.id).status == "failed", "it to be told")
    assert time.monotonic() - killed < 10 + 5  # the machine may be busy
    error = there.responses.retrieve(response.id).error
    assert error
    assert error.message == "The server that made it is gone."


def test_a_stopped_server_finishes_what_is_nearly_done(ask: Ask, redis: RedisServer) -> None:
    """Also, an answer is read to its end if that takes more than one round."""
    servers = [ask.serve(redis.port, constants={"answers_redis.MANY": 7}) for _ in range(2)]
    here, there = (asked(server) for server in servers)
    short = here.responses.create(model="parrot", input=words(60), background=True)
    long = here.responses.create(model="parrot", input=words(5000), background=True)
    servers[0].signal(signal.SIGTERM)
    servers[0].wait()
    assert there.responses.retrieve(short.id).output_text == words(60)
    wait_for(lambda: there.responses.retrieve(long.id).status == "failed", "it to be given up")
    assert "Traceback" not in servers[0].log


def test_one_connection_for_each_server(ask: Ask, redis: RedisServer) -> None:
    servers = [ask.serve(redis.port) for _ in range(2)]
    with ThreadPoolExecutor(50) as pool:

        def read(number: int) -> str:
            response = asked(servers[0]).responses.create(
                model="parrot", input=words(50), background=True
            )
            stream: Any = asked(servers[number % 2]).responses.retrieve(response.id, stream=True)
            return text_of(list(stream))

        texts = [pool.submit(read, number) for number in range(100)]
        most = 0
        while not all(text.done() for text in texts):
            most = max(most, redis.connections())
            time.sleep(0.02)
    assert {text.result() for text in texts} == {words(50)}
    assert most <= 2


def refuse(redis: RedisServer, line: BadLine) -> None:
    line.break_off()


def hang(redis: RedisServer, line: BadLine) -> None:
    redis.signal(signal.SIGSTOP)


def fall_silent(redis: RedisServer, line: BadLine) -> None:
    line.silence()
    line.dead = True


def read_only(redis: RedisServer, line: BadLine) -> None:
    redis.client.replicaof("127.0.0.1", 1)


def full(redis: RedisServer, line: BadLine) -> None:
    redis.client.config_set("maxmemory", "1")


def other_user(redis: RedisServer, line: BadLine) -> None:
    redis.client.acl_setuser("default", enabled=True, nopass=True, commands=["-xadd", "-set"])


@pytest.mark.parametrize("fail", [refuse, hang, fall_silent, read_only, full, other_user])
def test_redis_fails(
    ask: Ask, redis: RedisServer, fail: Callable[[RedisServer, BadLine], None]
) -> None:
    """Every request gets an answer in time, readers stay, and all goes on when Redis is well."""
    line = BadLine(redis.port)
    server, there = (ask.serve(line.port) for _ in range(2))
    client = asked(server)
    long, other, gone = (
        client.responses.create(model="parrot", input=words(400), background=True) for _ in range(3)
    )
    url = f"{server.url}/v1/responses"
    with (
        ThreadPoolExecutor(5) as pool,
        httpx.stream(
            "GET", f"{there.url}/v1/responses/{long.id}?stream=true", timeout=LIMIT
        ) as reader,
    ):
        pieces = reader.iter_text()
        text = next(pieces)
        fail(redis, line)

        def time_of(method: str, path: str) -> tuple[int, float]:
            body = {"model": "parrot", "input": "x", "background": True}
            began = time.monotonic()
            options: Any = {"json": body} if method == "POST" and not path else {}
            with httpx.stream(method, url + path, timeout=LIMIT, **options) as answer:
                if answer.status_code == 503:
                    assert answer.headers["Retry-After"]
                    assert b"error" in answer.read()
            return answer.status_code, time.monotonic() - began

        requests = [("POST", ""), ("GET", f"/{long.id}"), ("GET", f"/{long.id}?stream=true")]
        requests += [("POST", f"/{other.id}/cancel"), ("DELETE", f"/{gone.id}")]
        reads = [("GET", f"/{long.id}")]
        for repeat in (requests, reads):  # again, when the connection is known to be dead
            for (method, path), (status, took) in zip(
                repeat, pool.map(time_of, *zip(*repeat, strict=True)), strict=True
            ):
                assert took < 5 + 3, (method, path)  # the machine may be busy
                assert status == 503, (method, path)
        redis.signal(signal.SIGCONT)
        line.mend()
        line.call(line.silent.clear)
        if fail is not hang:
            redis.client.replicaof("NO", "ONE")
            redis.client.config_set("maxmemory", "0")
            redis.client.acl_setuser("default", enabled=True, nopass=True, commands=["+@all"])
        text += "".join(pieces)
    assert text.count("event: response.completed") == 1
    assert [int(n) for n in ids_in(text)] == list(range(8 + 400))
    assert client.responses.create(model="parrot", input="a b").output_text == "a b"
    for response in (other, gone):
        assert events_of(client, response.id)[-1]["type"] == "response.completed"


def test_an_answer_that_was_not_begun_is_forgotten(ask: Ask, redis: RedisServer) -> None:
    """Its first event got to Redis, but nobody was told so."""
    line = BadLine(redis.port)
    server = ask.serve(line.port)
    line.cut_answer_to = b"XADD"
    line.no_more = True  # so it cannot be asked again either
    with pytest.raises(openai.InternalServerError):
        asked(server).responses.create(model="parrot", input="a b", background=True)
    line.mend()
    (key,) = redis.client.keys("answers:resp_*")
    assert redis.client.ttl(key) > 0
    assert asked(server).responses.create(model="parrot", input="a b").output_text == "a b"


def ids_in(text: str) -> list[str]:
    return [line.removeprefix("id: ") for line in text.splitlines() if line.startswith("id: ")]


def test_something_else_is_there(ask: Ask, redis: RedisServer) -> None:
    server = ask.serve(redis.port)
    client = asked(server)
    ids = [f"resp_{number:032x}" for number in range(3)]
    redis.client.set(f"answers:{ids[0]}", "text")
    redis.client.xadd(f"answers:{ids[1]}", {"other": "field"}, id="0-1")
    redis.client.xadd(f"answers:{ids[2]}", {"type": "x", "data": "{", "server": ""}, id="5-1")
    for response_id in ids:
        for stream in ("", "?stream=true"):
            url = f"{server.url}/v1/responses/{response_id}{stream}"
            assert httpx.get(url).status_code in (404, 503)
    assert client.responses.create(model="parrot", input="a b").output_text == "a b"
    assert "Traceback" not in server.log


def test_a_loop_in_the_background_survives_what_nobody_expected(
    ask: Ask, redis: RedisServer
) -> None:
    servers = [ask.serve(redis.port, environment={"FAIL": "1"}) for _ in range(2)]
    here, there = (asked(server) for server in servers)
    servers[1].wait_for_log("ERROR: +answers: ZeroDivisionError: nobody expected this\n", 2)
    # Without it, nothing would be read here, or given up.
    response = here.responses.create(model="parrot", input=words(300), background=True)
    assert events_of(there, response.id)[-1]["type"] == "response.completed"
    response = here.responses.create(model="parrot", input=words(5000), background=True)
    servers[0].kill()
    assert events_of(there, response.id)[-1]["type"] == "response.failed"
    assert "Traceback" not in servers[1].log


def test_a_server_that_starts_before_redis(ask: Ask, redis: RedisServer) -> None:
    redis.kill()
    server = ask.serve(redis.port)
    with pytest.raises(openai.InternalServerError):
        asked(server).responses.create(model="parrot", input="a b")
    redis.start()
    wait_for(lambda: created(server), "an answer")


def created(server: Process) -> bool:
    try:
        return asked(server).responses.create(model="parrot", input="a b").output_text == "a b"
    except openai.InternalServerError:
        return False


def test_a_password_is_in_no_log(ask: Ask, redis: RedisServer) -> None:
    url = f"redis://user:secret@127.0.0.1:{redis.port}"  # which is wrong
    server = ask.serve(environment={"REDIS_URL": url})
    with pytest.raises(openai.InternalServerError) as told:
        asked(server).responses.create(model="parrot", input="a b")
    server.wait_for_log("answers: ")
    assert "secret" not in server.log + str(told.value)
