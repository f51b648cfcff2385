"""aiohttp-sse, as its README shows it, on uvloop: https://github.com/aio-libs/aiohttp-sse"""

import asyncio
import sys

import uvloop
from aiohttp import web
from aiohttp_sse import sse_response
from events import event_json


async def sse(request: web.Request) -> web.StreamResponse:
    steps, interval = int(request.query["steps"]), float(request.query["interval"])
    async with sse_response(request) as response:
        for event_id in range(steps):
            await response.send(event_json(event_id, steps), id=str(event_id), retry=1000)
            await asyncio.sleep(interval)
    return response


app = web.Application()
app.router.add_route("GET", "/sse", sse)

if __name__ == "__main__":
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=None,
        print=None,
        loop=uvloop.new_event_loop(),
    )
