"""Questions to the recipes `tokens` and `relay`, and the servers to put them to."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx
import openai
from openai import OpenAI

from tests.support.processes import LIMIT, Process, Start
from tests.support.recipes import start_changed

QUESTION = "What is a <b>token</b>? A piece of text, such as ☕."
LONG = "A long answer, of which nobody reads the end. " * 100  # 1,100 tokens


http = httpx.Client(timeout=LIMIT)  # one takes longer to make than an answer


def serve(start: Start, app: str, upstream: str = "", **constants: Any) -> Process:
    """Start `tokens`, `relay` or `tests.support.tokens_servers:cut_up`, with other constants."""
    settings = {"UPSTREAM_URL": upstream, "UPSTREAM_KEY": "the-key" if upstream else ""}
    return start_changed(start, app, **constants, **settings)


def asked(question: Any = QUESTION, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    messages = [{"role": "user", "content": question}]
    return {"model": "parrot", "messages": messages, **fields}


@cache
def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="the-readers", max_retries=0, timeout=LIMIT)


def read(server: Process, **question: Any) -> tuple[str, openai.APIError | None]:
    """Ask with the `openai` package; return the text that came, and the error, if there was one."""
    text = ""
    try:
        answer = client_of(server.url).chat.completions.create(**asked(**question))
        if not question.get("stream"):
            return answer.choices[0].message.content or "", None
        for chunk in answer:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        return text, error
    return text, None


def post(server: Process, body: Any) -> httpx.Response:
    """POST these bytes, or this as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"{server.url}/v1/chat/completions"
    headers = {"Content-Type": "application/json", "Authorization": "Bearer the-readers"}
    return http.post(url, content=content, headers=headers)


@contextmanager
def raw_post(server: Process, question: dict[str, Any]) -> Iterator[socket.socket]:
    """Ask, and leave at the end of the `with` block."""
    body = json.dumps(question)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), LIMIT) as reader:
        reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        yield reader


def stopped_after(parrot: Process, count: int) -> list[str]:
    """Return after how many tokens each of `count` long answers stopped."""
    return parrot.wait_for_log(r"the parrot stopped after (\d+) of 1\d\d\d tokens", count)
