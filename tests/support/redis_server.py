"""A Redis server of a test's own, to be killed, stalled and started again, and a bad line to it."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import redis

from tests.support.processes import Process, free_port, need, wait_for

T = TypeVar("T")


class RedisServer(Process):
    """It writes down each command before it answers: killed and started again it has lost nothing.

    Without `appendfsync always` it would put off writing while the disk is busy, for seconds.
    """

    def __init__(self, directory: Path, *options: str, password: str | None = None) -> None:
        port = free_port()
        self.password = password
        command = [need("redis-server", "redis-server"), "--bind", "127.0.0.1"]
        command += ["--port", str(port), "--dir", str(directory), "--save", ""]
        super().__init__(
            [*command, "--appendonly", "yes", "--appendfsync", "always", *options],
            directory / f"redis-{port}.log",
            port,
        )

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @cached_property
    def client(self) -> Any:
        return redis.Redis(port=self.port, password=self.password, decode_responses=True)

    def wait_until_listening(self) -> None:
        """Wait until it answers: it listens before that, while it reads what it wrote down."""
        super().wait_until_listening()

        def answers() -> bool:
            with suppress(redis.ConnectionError):
                return bool(self.client.ping())
            return False

        wait_for(answers, "Redis to answer")

    def connections(self) -> int:
        """How many there are, without the one that asks."""
        return len(self.client.client_list()) - 1


class BadLine:
    """A line to a server that can be broken: `port` is where to call.

    It runs in a thread of its own, so that it can be used from tests of any kind.
    """

    def __init__(self, port: int) -> None:
        self.to = port
        self.port = free_port()
        self.dead = False  # nobody answers here
        self.delay = 0.0  # seconds that whatever passes takes, in each direction
        self.cut_answer_to = b""  # the next command with this in it gets there, its answer not back
        self.no_more = False  # and then nobody answers here
        self.silent_from = b""  # a command with this in it passes no more, nor does what follows
        self.open: set[asyncio.StreamWriter] = set()  # to the callers
        self.silent: set[asyncio.StreamWriter] = set()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run(asyncio.start_server(self.connect, "127.0.0.1", self.port))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def call(self, function: Any) -> None:
        async def work() -> None:
            function()

        self.run(work())

    def silence(self) -> None:
        """Pass no byte any more on the connections that are open, and do not close them either."""
        self.call(lambda: self.silent.update(self.open))

    def break_off(self) -> None:
        """Close the connections, and take no new one until `mend`."""

        def work() -> None:
            self.dead = True
            for writer in self.open:
                writer.transport.abort()

        self.call(work)

    def mend(self) -> None:
        self.dead = False

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.dead:
                raise OSError
            answers, commands = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.transport.abort()
            return
        self.open.add(writer)
        cut = False

        async def pass_on(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            nonlocal cut
            with suppress(OSError):
                while data := await source.read(65536):
                    await asyncio.sleep(self.delay)
                    if to is commands and self.silent_from and self.silent_from in data:
                        self.silent.add(writer)
                    while writer in self.silent:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                    if to is commands and self.cut_answer_to and self.cut_answer_to in data:
                        self.cut_answer_to, cut = b"", True
                    elif to is writer and cut:
                        self.dead = self.dead or self.no_more
                        return
                    to.write(data)
                    await to.drain()

        # Both directions end together.
        ways = [pass_on(reader, commands), pass_on(answers, writer)]
        tasks = [asyncio.create_task(way) for way in ways]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        self.open.discard(writer)
        writer.transport.abort()
        commands.transport.abort()


@contextmanager
def running_redis(
    directory: Path, *options: str, password: str | None = None
) -> Iterator[RedisServer]:
    server = RedisServer(directory, *options, password=password)
    try:
        yield server
    finally:
        server.kill()
