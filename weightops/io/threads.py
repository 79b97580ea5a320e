"""Several things done at one time, by threads that are there once for all of a process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from weightops.io.platform.machine import cores, once_per_process

T = TypeVar("T")


def together(jobs: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """What the jobs give, in their order, done by several threads if there may be more than one."""
    if min(len(jobs), threads) <= 1:
        return [job() for job in jobs]
    pending = [_pool().submit(job) for job in jobs]
    wait(pending)  # also after a failure: they may write to memory that others use next
    return [future.result() for future in pending]


@once_per_process
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), "blocks")
