"""A feed with aiohttp-sse on uvloop, and a queue for each reader, as its example chat has it:
https://github.com/aio-libs/aiohttp-sse/blob/master/examples/chat.py
"""

import asyncio
import sys
from itertools import count

import uvloop
from aiohttp import web
from aiohttp_sse import sse_response

queues: set[asyncio.Queue[tuple[str, str]]] = set()
ids = count(1)


async def publish(request: web.Request) -> web.Response:
    event_id, data = str(next(ids)), (await request.json())["data"]
    for queue in queues:
        queue.put_nowait((event_id, data))
    return web.json_response({"id": event_id}, status=201)


async def feed(request: web.Request) -> web.StreamResponse:
    queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    async with sse_response(request) as response:
        queues.add(queue)
        try:
            while response.is_connected():
                event_id, data = await queue.get()
                await response.send(data, id=event_id)
        finally:
            queues.discard(queue)
    return response


app = web.Application()
app.router.add_route("GET", "/feed", feed)
app.router.add_route("POST", "/feed", publish)

if __name__ == "__main__":
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=None,
        print=None,
        loop=uvloop.new_event_loop(),
    )
