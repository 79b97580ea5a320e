"""Groups of a job on a Dask cluster: each is one task of two texts and a number.

Source: distributed's `Client.submit`, `Worker.log_event` and `Client.subscribe_topic`, and what it says of workers that
die (`KilledWorker`, after `distributed.scheduler.allowed-failures` deaths) or freeze (`worker-ttl`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from weightops.engine.control import Control, Progress, Silent
from weightops.engine.job.documents import read_ending
from weightops.engine.job.place import OpenJob
from weightops.engine.job.work import work
from weightops.errors import NetworkFailed, NoRoom, UsageError, WeightopsError
from weightops.io.escape import escape

_RETRIES = 2
_EVENT_S = 1.0
_POLL_S, _CONNECT_S, _WORKERS_S = 0.05, 30, 120
Task = Callable[[str, int, tuple[str, ...], Progress], None]
"""Does a group of the job at a place, by its number; says where else outputs may lie, and who is told of progress."""


def do_group(place: str, number: int, roots: tuple[str, ...], progress: Progress) -> None:
    """The task, with connections as they are made where nobody says how."""
    work(place, number, Control(progress), roots=roots)


@dataclass(frozen=True)
class Dask:
    """A cluster that is up, by the address of its scheduler; `task` is what its workers do."""

    address: str
    task: Task = do_group
    needs_job: ClassVar[bool] = True

    def do(self, job: OpenJob, groups: Sequence[int], control: Control) -> None:
        """Raises `NetworkFailed` if the cluster cannot be reached, `NoRoom` for groups that workers died of."""
        distributed = _distributed()
        try:
            client = distributed.Client(self.address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise NetworkFailed(
                f"no Dask cluster answers at {escape(self.address)} ({escape(str(error))})",
                hint="name the scheduler's address, as in --executor dask:tcp://127.0.0.1:8786",
            ) from None
        with client:
            _run(client, self.task, job, groups, control)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise UsageError("Dask is not installed", hint="pip install 'weightops[dask]'") from None
    return distributed


def _run(client: Any, task: Task, job: OpenJob, groups: Sequence[int], control: Control) -> None:
    roots = tuple(output.out for output in job.document.outputs)
    topic = f"weightops-{job.document.fingerprint[:16]}-{time.time_ns()}"
    client.subscribe_topic(topic, lambda event: _hear(event[1], control.progress))
    nbytes = sum(
        shard.nbytes for i in range(len(roots)) for shard in read_ending(job.store, job.document, i).shards.values()
    )
    control.progress.start("writing", nbytes)
    pending = {
        client.submit(_on_worker, task, job.place, n, roots, topic, pure=False, retries=_RETRIES): n for n in groups
    }
    seen_s = time.monotonic()
    try:
        while pending:
            control.check()
            if _has_workers(client):
                seen_s = time.monotonic()
            elif time.monotonic() - seen_s > _WORKERS_S:
                raise NetworkFailed(
                    f"the Dask cluster at {escape(client.scheduler.address)} has had no worker for {_WORKERS_S} s",
                    hint="look at the workers' logs; the same command goes on once there are some",
                )
            done = [future for future in pending if future.done()]
            for future in done:
                _raise_failure(future, pending.pop(future), client)
            if not done:
                time.sleep(_POLL_S)
    finally:
        # What has begun cannot be stopped, and may go on: it is the same work for whoever continues.
        client.cancel(list(pending))
        client.unsubscribe_topic(topic)
    control.progress.stop()


def _has_workers(client: Any) -> bool:
    try:
        return bool(client.scheduler_info(n_workers=1)["workers"])
    except OSError as error:
        raise NetworkFailed(
            f"the Dask cluster does not answer any more ({escape(str(error))})",
            hint="the same command goes on once there is one",
        ) from None


def _raise_failure(future: Any, number: int, client: Any) -> None:
    """What a group failed of, as ours."""
    if future.status == "finished":
        return
    error = future.exception() if future.status == "error" else None
    if isinstance(error, WeightopsError):
        raise error
    if error is None:
        raise WeightopsError(f"group {number} was cancelled by the cluster", hint="run the same command again")
    if type(error).__name__ == "KilledWorker":
        limits = [worker["memory_limit"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
        least = f", whose memory limit is {min(limits)} bytes" if limits and min(limits) else ""
        raise NoRoom(
            f"group {number}: the workers that had it died{least}",
            hint="give workers more memory, or look at their logs; the same command continues",
        )
    raise WeightopsError(f"group {number}: {escape(f'{type(error).__name__}: {error}')}") from error


def _on_worker(task: Task, place: str, number: int, roots: tuple[str, ...], topic: str) -> None:
    from distributed import get_worker

    worker = get_worker()
    told = Telling(lambda event: worker.log_event(topic, event))
    task(place, number, roots, told)
    told.tell()


class Telling(Silent):
    """Progress that is sent on, an event a shard and at most one a second beside."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send, self._lock = send, threading.Lock()
        self._nbytes, self._told_s = 0, time.monotonic()

    def advance(self, nbytes: int, name: str = "") -> None:
        with self._lock:
            self._nbytes += nbytes
        if time.monotonic() - self._told_s > _EVENT_S:
            self.tell()

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        self.tell(name=name, nbytes=nbytes)

    def tell(self, **more: Any) -> None:
        """Send what has been done since the last time."""
        with self._lock:
            done, self._nbytes, self._told_s = self._nbytes, 0, time.monotonic()
        self._send({"advance": done, **more})


def _hear(event: dict[str, Any], progress: Progress) -> None:
    progress.advance(event["advance"])
    if "name" in event:
        progress.finish_file(event["name"], event["nbytes"], False)
