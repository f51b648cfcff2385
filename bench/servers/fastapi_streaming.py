"""FastAPI's StreamingResponse: https://fastapi.tiangolo.com/advanced/custom-response/#streamingresponse"""

from events import generate_sse
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

app = FastAPI()


@app.get("/sse")
async def sse(steps: int = 10, interval: float = 1.0) -> StreamingResponse:
    return StreamingResponse(generate_sse(steps, interval), media_type="text/event-stream")
