"""Bad input, tried by machine: never a 500, never a hang; and /openapi.json says what comes."""

from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.processes import Process

SLOW_MACHINE = settings(deadline=None, suppress_health_check=list(HealthCheck))
LIMIT = 60  # seconds


@pytest.mark.parametrize("path", ["/text", "/ndjson", "/sse"])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_answer_is_one_that_the_description_names(
    shared_server: Process, path: str, mode: schemathesis.GenerationMode
) -> None:
    """The status, the media type and the body of every answer, to good and to bad requests."""
    schema = schemathesis.openapi.from_url(f"{shared_server.url}/openapi.json")
    operation = schema[path]["GET"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(SLOW_MACHINE, max_examples=25)
    def check(case: Any) -> None:
        # Or a stream would take its time.
        if is_in_range(case.query.get("interval", 1.0)):
            case.query["interval"] = 0.0
        if isinstance(steps := case.query.get("steps"), int) and 100 < steps <= 100_000:
            case.query["steps"] = 100
        case.call_and_validate(timeout=LIMIT)

    check()


def is_in_range(interval: Any) -> bool:
    try:
        return 0 <= float(interval) <= 10
    except (TypeError, ValueError):
        return False


# What a header can carry: visible characters of Latin-1, and spaces inside.
header_values = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30
).map(str.strip)


@pytest.mark.parametrize("path", ["/ndjson", "/sse"])
@given(last=header_values | st.integers(0, 120).map(str) | st.integers().map(str))
@example(last="")
@example(last="9" * 4000)
@example(last="0" * 4000 + "5")
@example(last="+1")
@example(last="1_0")
@example(last="²")
@SLOW_MACHINE
def test_any_last_event_id(shared_server: Process, path: str, last: str) -> None:
    """The rest of the stream, 204 or 422: whatever the header says, it is one of these."""
    response = requests.get(
        f"{shared_server.url}{path}?steps=100&interval=0",
        headers={"Last-Event-ID": last.encode("latin-1")},
        timeout=LIMIT,
    )
    if not last or (last.isascii() and last.isdigit()):
        left = max(0, 99 - int(last or -1))
        assert response.status_code == (200 if left else 204)
        assert response.text.count("event_id") == left
    else:
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == ["header", "last-event-id"]
