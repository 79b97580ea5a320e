"""Doing all groups of a job: in threads of this process, or by whoever else can be given two texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

from weightops.engine.control import Control
from weightops.engine.digest import in_threads
from weightops.engine.job.documents import FINISHED, record_name
from weightops.engine.job.place import OpenJob
from weightops.engine.job.work import work_on


class Executor(Protocol):
    """What does the groups of a job. It may do one any number of times, anywhere, and go on when it is told to stop."""

    needs_job: ClassVar[bool]
    """Whether others do the work, so that the job must lie where they see it."""

    def do(self, job: OpenJob, groups: Sequence[int], control: Control) -> None:
        """Do these groups; raises the first failure, and begins no others then."""


@dataclass(frozen=True)
class Threads:
    """Threads of this process, as many as `workers` at a time."""

    workers: int | None = None
    needs_job: ClassVar[bool] = False

    def do(self, job: OpenJob, groups: Sequence[int], control: Control) -> None:
        workers = max(1, min(self.workers or os.cpu_count() or 1, len(groups)))
        threads = (os.cpu_count() or 1) // workers

        def one(number: int, control: Control) -> None:
            work_on(job, number, control, max(1, threads))

        in_threads(workers, control, [partial(one, number) for number in groups])


def drive(job: OpenJob, executor: Executor, control: Control) -> None:
    """Have all groups done that are not."""
    if job.store.find(FINISHED) is not None:
        return
    there = set(job.store.listed("records"))
    missing = [number for number in range(job.document.groups) if record_name(number) not in there]
    if missing:
        executor.do(job, missing, control)
