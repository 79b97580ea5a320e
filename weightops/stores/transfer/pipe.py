"""The way of a stream's chunks from the network to the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from weightops.io.platform.machine import page_memory
from weightops.stores.transfer.partial import CHUNK_NBYTES


class Pipe:
    """One stream's chunks: one arrives while those before it are hashed and written."""

    def __init__(self) -> None:
        self._slots = [memoryview(page_memory(CHUNK_NBYTES)) for _ in range(3)]
        self._pending: list[list[Future[None]]] = [[], [], []]
        self._executors = (ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "write"))
        self._turn = 0

    def slot(self) -> memoryview:
        """Memory for the next chunk; raises what went wrong with the one that had it before."""
        pending, self._pending[self._turn] = self._pending[self._turn], []
        for future in pending:
            future.result()
        return self._slots[self._turn]

    def put(self, *works: Callable[[], None]) -> None:
        """Do these, side by side, with the slot that was handed out last."""
        self._pending[self._turn] = [e.submit(work) for e, work in zip(self._executors, works, strict=True)]
        self._turn = (self._turn + 1) % len(self._slots)

    def drain(self) -> None:
        """Wait until everything is done; raises as `slot` does."""
        for _ in self._slots:
            self.slot()
            self._turn = (self._turn + 1) % len(self._slots)

    def close(self) -> None:
        for executor in self._executors:
            executor.shutdown(wait=True, cancel_futures=True)
