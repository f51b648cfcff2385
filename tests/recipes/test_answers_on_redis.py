"""The recipe `answers` on Redis: two servers, and a Redis that fails in every way."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.faults import answers as faults
from tests.support.answers import asked, events_of, http, serve, text_of, words
from tests.support.processes import ROOT, Process, Start, need, wait_for
from tests.support.redis_server import RedisServer, running_redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


def test_faults() -> None:
    """Each fault, one after the other, on the same servers: they go on without a restart."""
    need("redis-server", "redis-server")
    with faults.setting() as it:
        for fault in faults.OF_SERVERS + faults.OF_REDIS:
            seen = faults.run(it, fault, 4, 2, tokens=100)
            assert not seen.bad, (fault.name, seen)
            assert seen.completed + seen.failed == 4, (fault.name, seen)
            if fault in faults.OF_REDIS:  # the models and their servers were well all the time
                assert not seen.failed, fault.name
                assert all(reader.opened == 1 for reader in it.readers), fault.name
            else:
                assert seen.failed <= 2, fault.name


def test_the_table_is_of_what_answers_py_does() -> None:
    section = (ROOT / "tests/README.md").read_text().partition("<!-- faults of answers -->\n")[2]
    head, line, *rows = section.partition("\n\n")[0].splitlines()
    assert f"{head}\n{line}" == faults.HEAD
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == [fault.name for fault in faults.FAULTS]
    assert {tuple(row[3:7]) for row in cells} == {("0", "0", "0", "0")}


def test_any_server_reads_stops_and_forgets(start: Start, redis: RedisServer) -> None:
    """Although every third round fails in a way that nobody expected, and none reads much."""
    app = "tests.support.failing_answers:app"
    servers = [serve(start, redis.redis_url, app=app, answers_redis__MANY=50) for _ in range(2)]
    here, there = (asked(server) for server in servers)

    def cancel(response_id: str) -> None:
        """Ask both servers at once: there is one end."""
        with ThreadPoolExecutor() as pool:
            stopped = [*pool.map(lambda each: each.responses.cancel(response_id), (here, there))]
        assert {each.status for each in stopped} == {"cancelled"}

    for end in (cancel, there.responses.delete):
        response = here.responses.create(model="parrot", input=words(5000), background=True)
        came: list[Any] = []
        for event in there.responses.retrieve(response.id, stream=True):
            came.append(event)
            if event.sequence_number == 20:
                assert 3500 < redis.client.ttl(f"answers:{response.id}") <= 3600
                end(response.id)
        assert [event.sequence_number for event in came] == list(range(len(came)))
        assert came[-1].response.status == "cancelled"
        assert came[-1].response.output_text == text_of(came)
    # Both models have stopped, on the server that was not asked to.
    servers[0].wait_for_log("the parrot stopped after", 2)
    with pytest.raises(openai.NotFoundError):
        here.responses.retrieve(response.id)
    assert words(5)[:20] not in str(redis.client.xrange(f"answers:{response.id}"))

    # A server that is stopped finishes what is nearly done. The rest is given up.
    short = here.responses.create(model="parrot", input=words(60), background=True)
    long = here.responses.create(model="parrot", input=words(5000), background=True)
    servers[0].signal(signal.SIGTERM)
    servers[0].wait()
    assert there.responses.retrieve(short.id).output_text == words(60)
    assert events_of(there, long.id)[-1]["type"] == "response.failed"
    servers[1].wait_for_log("ERROR: +answers: ZeroDivisionError: nobody expected this\n", 2)
    assert "Traceback" not in servers[0].log + servers[1].log


def test_a_model_may_be_silent_but_its_server_may_not(start: Start, redis: RedisServer) -> None:
    constants: dict[str, Any] = {"answers_redis__BEAT": 0.5, "answers_redis__GONE": 3}
    constants["parrot__SECONDS_PER_TOKEN"] = 600
    servers = [serve(start, redis.redis_url, **constants) for _ in range(2)]
    here, there = (asked(server) for server in servers)
    response = here.responses.create(model="parrot", input="a", background=True)
    with there.responses.retrieve(response.id, stream=True):  # so it is followed there
        # The signs of life of more than 3 seconds.
        wait_for(lambda: redis.client.xlen(f"answers:{response.id}") > 8, "signs of life")
        assert there.responses.retrieve(response.id).status == "in_progress"
        # A full Redis takes no sign of life, for longer than 3 seconds. That is no dead server.
        redis.client.config_set("maxmemory", 1)
        with pytest.raises(openai.InternalServerError):
            there.responses.retrieve(response.id)
        redis.client.config_set("maxmemory", 0)
        assert there.responses.retrieve(response.id).status == "in_progress"
    assert there.responses.cancel(response.id).status == "cancelled"
    servers[0].wait_for_log("the parrot stopped after 0 of 1")
    assert here.responses.retrieve(response.id).status == "cancelled"

    response = here.responses.create(model="parrot", input="a", background=True)
    servers[0].kill()
    # Asked without a stream.
    wait_for(lambda: there.responses.retrieve(response.id).status == "failed", "it to be told")
    error = there.responses.retrieve(response.id).error
    assert error
    assert error.message == "The server that made it is gone."


def test_a_redis_that_comes_late_and_has_other_things_in_it(
    start: Start, redis: RedisServer
) -> None:
    redis.kill()
    server = serve(start, redis.redis_url.replace("//", "//user:secret@"))
    assert not is_answered(server)
    redis.start()
    with pytest.raises(openai.InternalServerError) as told:  # Redis does not know that user
        asked(server).responses.create(model="parrot", input="a b")
    server.wait_for_log("ERROR: +answers: ")
    assert "secret" not in server.log + str(told.value)
    redis.client.execute_command("ACL SETUSER user on >secret ~* +@all")
    wait_for(lambda: is_answered(server), "an answer")

    ids = [f"resp_{number:032x}" for number in range(3)] + ["none"]
    redis.client.set(f"answers:{ids[0]}", "text")
    redis.client.xadd(f"answers:{ids[1]}", {"other": "field"}, id="0-1")
    redis.client.xadd(f"answers:{ids[2]}", {"type": "x", "data": "{", "server": ""}, id="5-1")
    for response_id, status in zip(ids, (503, 404, 404, 404), strict=True):
        answer = http.get(f"{server.url}/v1/responses/{response_id}?stream=true")
        assert answer.status_code == status
    assert is_answered(server)
    assert "Traceback" not in server.log


def test_a_long_answer_is_read_at_once_although_many_others_go_on(
    start: Start, redis: RedisServer
) -> None:
    server = serve(start, redis.redis_url, answers_redis__MANY=400)
    client = asked(server)
    short = client.responses.create(model="parrot", input="a")
    first, delta, end = redis.client.xrange(f"answers:{short.id}")
    long = f"resp_{'1' * 32}"
    for number, part in enumerate([first, *[delta] * 4000], 1):
        redis.client.xadd(f"answers:{long}", part[1], id=f"0-{number}")
    redis.client.xadd(f"answers:{long}", end[1], id="1-0")
    for _ in range(20):
        client.responses.create(model="parrot", input=words(5000), background=True)
    assert client.responses.retrieve(long).output_text == "a" * 4000


def is_answered(server: Process) -> bool:
    try:
        return asked(server).responses.create(model="parrot", input="a b").output_text == "a b"
    except openai.InternalServerError:
        return False
