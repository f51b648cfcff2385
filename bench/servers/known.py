"""A server with known faults, on which bench/run.py tries its load generator before it measures.

`known.py PORT LATE BURN HELD`: each event burns BURN seconds of CPU, and all but the first leave
LATE seconds after they are due; each stream keeps HELD bytes; event 3 of each is never sent.
"""

import mmap
import sys
import time

import bare_uvloop
import uvloop
from events import event_sse

LATE, BURN, HELD = float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
LOST = 3


class KnownStreams(bare_uvloop.Streams):
    held: mmap.mmap | None = None

    def data_received(self, data: bytes) -> None:
        self.held = mmap.mmap(-1, HELD)  # unlike a bytearray, never memory that was used before
        self.held.write(b"x" * HELD)
        self.start = self.loop.time()
        super().data_received(data)

    def send_event(self) -> None:
        end = time.thread_time() + BURN
        while time.thread_time() < end:
            pass
        if self.event_id != LOST:
            event = event_sse(self.event_id, self.steps)
            self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        self.event_id += 1
        if self.event_id == self.steps:
            self.transport.write(b"0\r\n\r\n")
            return
        due = self.start + self.event_id * self.interval + LATE
        self.timer = self.loop.call_at(due, self.send_event)

    def connection_lost(self, error: Exception | None) -> None:
        if self.held:
            self.held.close()
        super().connection_lost(error)


if __name__ == "__main__":
    bare_uvloop.Streams = KnownStreams  # type: ignore[misc]
    uvloop.run(bare_uvloop.main())
