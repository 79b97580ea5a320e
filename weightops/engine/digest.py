"""Evaluating tensors for what their ops note on the way, digests above all, several at a time."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from weightops.engine.control import Control
from weightops.engine.stream import BLOCK_NBYTES
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.measures.witness import witness
from weightops.spec import TensorSpec


def digest_tensors(
    tensors: Mapping[str, LazyTensor], workers: int | None = None, control: Control | None = None
) -> dict[str, tuple[TensorSpec, str]]:
    """Spec and xxh3_128 of each tensor, in order, read with one thread per core unless `workers` says otherwise."""
    watched = [witness(tensor, name) for name, tensor in tensors.items()]
    digests = watch("digesting", watched, workers or os.cpu_count() or 1, control or Control())
    return {name: (tensor.spec, digests[name]) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class Watched:
    """What the ops of evaluated tensors had to say of them, by label: digests, and numbers by name."""

    witnesses: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, float]] = field(default_factory=dict)


def watch(what: str, tensors: Sequence[LazyTensor], workers: int, control: Control) -> dict[str, str]:
    """Evaluate `tensors` for the witnesses in them; their digests by label."""
    return watch_all(what, tensors, workers, control).witnesses


def watch_all(what: str, tensors: Sequence[LazyTensor], workers: int, control: Control) -> Watched:
    """Evaluate `tensors`, `workers` of them at a time, for everything that their ops note."""
    found = Watched()
    waiting = queue.SimpleQueue[LazyTensor | None]()
    for tensor in (*tensors, *[None] * workers):
        waiting.put(tensor)

    def drain(control: Control) -> None:
        with Evaluator(control.stores, control.once) as read:
            while (tensor := waiting.get()) is not None:
                for nbytes in read.drain(tensor, BLOCK_NBYTES):
                    control.check()
                    control.progress.advance(nbytes)
            read.files.check_unchanged()
            found.witnesses.update(read.witnesses)
            found.notes.update(read.notes.values())

    control.progress.start(what, sum(tensor.nbytes for tensor in tensors))
    in_threads(workers, control, [drain] * workers)
    control.progress.stop()
    return found


def in_threads(workers: int, control: Control, jobs: Iterable[Callable[[Control], None]]) -> None:
    """Run all jobs; the first failure stops the others at their next block, and is raised."""
    own = Control(parent=control)
    with ThreadPoolExecutor(workers) as executor:
        futures = {executor.submit(job, own) for job in jobs}
        pending = futures
        try:
            while pending:
                # A signal that arrives just before the wait would only be handled after it: do not wait for long.
                done, pending = wait(pending, 0.5, FIRST_EXCEPTION)
                for future in done:
                    future.result()
        except BaseException:
            # Not where nobody is left to stop: connections are shared, and whoever asked may go on with others.
            if not all(future.done() for future in futures):
                own.cancel()
            for future in futures:
                future.cancel()
            raise
