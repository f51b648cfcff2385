"""A reader that others wrote gets all ten events: Node's eventsource. (bench/ has httpx-sse.)"""

import json
import subprocess

from tests.support.npm import node_modules
from tests.support.processes import LIMIT, ROOT, Process, need

TEN = [
    {"event_id": i, "data": f"Step {i + 1} of 10: ☕", "is_last_event": i == 9} for i in range(10)
]


def test_node_eventsource_stops_by_itself_at_the_204(server: Process) -> None:
    node = need("node", "nodejs npm")
    node_modules()
    script = ROOT / "tests/support/eventsource.mjs"
    # It would reconnect forever, and never exit, if a 204 did not tell it to stop.
    result = subprocess.run(
        [node, str(script), f"{server.url}/sse?interval=0.02"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    *events, end = [json.loads(line) for line in result.stdout.splitlines()]
    assert events == TEN
    assert end == {"closed_by": 204}
    assert server.log.count('"GET /sse') == 2, "the stream, and the request answered by 204"
