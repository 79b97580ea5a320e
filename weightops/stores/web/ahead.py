"""Ranges of files that are on their way before they are asked for: several at a time, each through its own connection.

One connection brings what one server gives to one, which is 85 to 90 MB/s from Amazon's; a file is read as fast as the
network is only through several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from weightops.errors import WeightopsError
from weightops.io.source_file import SourceFile

RANGE_NBYTES = 8 << 20


class Range:
    """The bytes `[start, stop)` of a file, of which the first `arrived_nbytes` are there; all, or no more will come."""

    def __init__(self, file: SourceFile, start: int, stop: int, buffer: memoryview) -> None:
        self.file, self.start, self.stop, self.buffer = file, start, stop, buffer
        self.arrived_nbytes = 0
        self.is_unwanted = False
        self.ended = Future[None]()

    def arrived(self, data: bytes) -> None:
        """Keep the bytes that come next."""
        self.buffer[self.arrived_nbytes : self.arrived_nbytes + len(data)] = data
        self.arrived_nbytes += len(data)

    def part(self, start: int, stop: int) -> memoryview:
        """What has arrived of `[start, stop)`, from `start` on, once no more will; it may be nothing."""
        self.ended.result()
        return self.buffer[start - self.start : min(stop - self.start, self.arrived_nbytes)]


class Ahead:
    """At most `count` ranges of `RANGE_NBYTES` each, for all threads; `fetch` fills one as far as it can.

    What `fetch` raises is dropped: whoever needs those bytes asks for them, and learns it again.
    """

    def __init__(self, fetch: Callable[[Range], None], count: int) -> None:
        self.count = count
        self._fetch = fetch
        self._left = count
        self._buffers: list[memoryview] = []
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def order(self, file: SourceFile, start: int, stop: int) -> Range | None:
        """Have the bytes fetched; None if there are as many ranges as there may be."""
        with self._lock:
            if not self._left:
                return None
            self._left -= 1
            self._pool = self._pool or ThreadPoolExecutor(self.count, "range")
            buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(RANGE_NBYTES))
        ordered = Range(file, start, stop, buffer)
        self._pool.submit(self._run, ordered)
        return ordered

    def _run(self, ordered: Range) -> None:
        try:
            with suppress(WeightopsError):
                self._fetch(ordered)
        finally:
            ordered.ended.set_result(None)

    def release(self, ordered: Range) -> None:
        """Let go of a range, whether it has arrived or not; what it lent is not to be looked at any more."""
        ordered.is_unwanted = True
        ordered.ended.add_done_callback(lambda _: self._take_back(ordered.buffer))

    def _take_back(self, buffer: memoryview) -> None:
        with self._lock:
            self._buffers.append(buffer)
            self._left += 1

    def close(self) -> None:
        """End the threads, as soon as what they wait for ends, and let go of the memory."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._buffers.clear()
        if pool is not None:
            pool.shutdown(wait=False)
