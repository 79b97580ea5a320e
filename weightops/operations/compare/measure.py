"""What is measured of pairs: all in one pass, and of some that changed the rank of the change, or its origin."""

from __future__ import annotations

import math
import os
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weightops.engine.control import Control
from weightops.engine.digest import in_threads, watch_all
from weightops.engine.proof import hold
from weightops.layouts.embeddings import has_rows_of_tokens
from weightops.lazy import Evaluator, LazyTensor
from weightops.operations.compare.pairing import Pair
from weightops.ops.elementwise import cast
from weightops.ops.lora.lowrank import OVERSAMPLE, SingularValues
from weightops.ops.measures.change_rank import energy_rank
from weightops.ops.measures.difference import Difference, TensorDifference
from weightops.ops.measures.statistics import has_statistics
from weightops.ops.measures.witness import witness
from weightops.spec import DType

_SAMPLED_ROWS = 128
_LEAST_SIZE = 16
"""Matrices with a smaller side are of low rank whatever changes."""
LOW = 8
"""A rank is low up to the smaller side of a matrix over this."""
_SEED = 0
_MOVED = 0.05
"""A relative change below this is no exchange of two tensors."""
_SAME_NORM = 1e-5
_SMALLEST, _LARGEST, _ABSURD = 1e-12, 1e12, 1e100
"""With ||d|| between the first two products stay in float32's range; beyond the last not even in float64's."""
_SKETCH_NBYTES = 64 << 20
"""What decompositions may take together beyond those of the first worker."""


@dataclass(frozen=True)
class Measured:
    """A pair, and what was found; no numbers where they are of types that have none, but whether bytes are the same.

    `rank` is None where it is not low, or was not asked for.
    """

    pair: Pair
    found: TensorDifference | None
    is_same_bytes: bool = False
    rank: int | None = None
    stable_rank: float | None = None
    moved_from: str | None = None
    is_repeated: bool = False
    """Whether another name of the same two tensors was measured already."""


def measure(pairs: Sequence[Pair], workers: int | None, control: Control) -> list[Measured]:
    """Everything about each pair; raises `CorruptInput` for files that cannot be read, `Differs` for wrong digests."""
    tensors = [tensor for pair in pairs for tensor in (pair.a, pair.b)]
    nodes = {node.op.source for tensor in tensors for node in tensor.walk() if node.op.source is not None}
    workers = workers or (1 if any(source.is_remote for source in nodes) else os.cpu_count() or 1)
    first = _first_pass(pairs, workers, control)
    hold(tensors, control)
    return _with_origins(_with_ranks(first, workers, control), workers, control)


def is_compared_as_numbers(pair: Pair) -> bool:
    """Whether both are numbers of whole bytes."""
    return has_statistics(pair.a.spec.dtype) and has_statistics(pair.b.spec.dtype)


def _first_pass(pairs: Sequence[Pair], workers: int, control: Control) -> list[Measured]:
    labels: dict[tuple[LazyTensor, LazyTensor], str] = {}
    watched = []
    for number, pair in enumerate(pairs):
        label = str(number)
        if labels.setdefault((pair.a, pair.b), label) != label:
            continue
        if is_compared_as_numbers(pair):
            watched.append(_difference(pair, label))
        else:
            watched += [witness(pair.a, f"a {label}"), witness(pair.b, f"b {label}")]
    seen = watch_all("comparing", watched, workers, control)
    result, done = [], set[str]()
    for pair in pairs:
        label = labels[pair.a, pair.b]
        note = seen.notes.get(label)
        found = TensorDifference.from_note(note) if note is not None else None
        same = found is None and seen.witnesses[f"a {label}"] == seen.witnesses[f"b {label}"]
        result.append(Measured(pair, found, same and pair.a.spec == pair.b.spec, is_repeated=label in done))
        done.add(label)
    return result


def _difference(pair: Pair, label: str) -> LazyTensor:
    shape = pair.a.spec.shape
    is_matrix = len(shape) == 2 and min(shape) >= _LEAST_SIZE and not has_rows_of_tokens(pair.key)
    op = Difference(label, pair.heads, pair.axis, _SAMPLED_ROWS if is_matrix else 0)
    return LazyTensor.make(op, *(tensor for tensor in (pair.a, pair.b, pair.steps) if tensor is not None))


def _with_ranks(found: Sequence[Measured], workers: int, control: Control) -> list[Measured]:
    """The same with ranks: from the first pass, or where that left a doubt and sampled rows say that it may be low."""
    result, chosen = list(found), dict[int, LazyTensor]()
    for number, each in enumerate(found):
        if each.found is None or not _may_have_rank(each, each.found):
            continue
        if each.found.rank is not None and _is_usual(each.found):
            result[number] = _ranked(each, each.found, each.found.rank, each.found.largest_square)
        elif (sketch := _sketch(each.pair, each.found)) is not None:
            chosen[number] = sketch
    for number, squares in (_evaluated(chosen, workers, control) if chosen else {}).items():
        each = found[number]
        assert each.found is not None
        rank = energy_rank(squares, each.found.norm_d * each.found.norm_d)
        if rank <= len(squares):  # else the sampled rows had fewer directions than all have
            result[number] = _ranked(each, each.found, rank, float(squares[0]))
    return result


def _ranked(each: Measured, found: TensorDifference, rank: int, largest_square: float) -> Measured:
    if rank > _most(each.pair.a.spec.shape) or not largest_square:
        return each
    return replace(each, rank=rank, stable_rank=found.norm_d * found.norm_d / largest_square)


def _most(shape: tuple[int, ...]) -> int:
    return max(1, min(shape) // LOW)


def _may_have_rank(each: Measured, found: TensorDifference) -> bool:
    """Whether it means something: not of rounding, not of what is not finite."""
    if each.is_repeated or each.pair.steps is not None or found.is_cast or found.is_cast_of_b:
        return False
    return not (found.odd or found.nan_a or found.infinite_a or found.norm_d > _ABSURD)


def _is_usual(found: TensorDifference) -> bool:
    return _SMALLEST < found.norm_d < _LARGEST


def _sketch(pair: Pair, found: TensorDifference) -> LazyTensor | None:
    if not 0 < found.sample_rank <= min(found.sample_rows // 2, _most(pair.a.spec.shape)):
        return None
    rows, columns = pair.a.spec.shape
    width = min(found.sample_rank + OVERSAMPLE, rows, columns)
    is_narrow = _is_usual(found) and DType.F64 not in (pair.a.spec.dtype, pair.b.spec.dtype)
    wide = DType.F32 if is_narrow else DType.F64
    op = SingularValues((rows, columns), width, 1, _SEED, pair.first.name)
    return LazyTensor.make(op, cast(pair.a, wide), cast(pair.b, wide))


def _evaluated(tensors: Mapping[int, LazyTensor], workers: int, control: Control) -> dict[int, np.ndarray]:
    """Squared singular values by number, computed by as many workers as memory is for."""
    largest = max(tensor.op.scratch_nbytes for tensor in tensors.values())
    workers = max(1, min(workers, 1 + _SKETCH_NBYTES // max(1, largest)))
    waiting, result = queue.SimpleQueue[int | None](), dict[int, np.ndarray]()
    for number in (*tensors, *[None] * workers):
        waiting.put(number)

    def work(control: Control) -> None:
        with _Stoppable(control) as read:
            while (number := waiting.get()) is not None:
                tensor = tensors[number]
                result[number] = np.frombuffer(read.whole(tensor), np.float64) ** 2
                control.progress.advance(sum(each.nbytes for each in tensor.inputs))

    control.progress.start("decomposing", sum(each.nbytes for tensor in tensors.values() for each in tensor.inputs))
    in_threads(workers, control, [work] * workers)
    control.progress.stop()
    return result


class _Stoppable(Evaluator):
    """Looks at every block of what a decomposition reads whether it is to stop: a whole one takes long."""

    def __init__(self, control: Control) -> None:
        super().__init__(control.stores, control.once)
        self._check = control.check

    def __call__(self, tensor: LazyTensor, start: int, out: memoryview) -> None:
        self._check()
        super().__call__(tensor, start, out)


def _with_origins(found: Sequence[Measured], workers: int, control: Control) -> list[Measured]:
    """The same with those named that hold what is another tensor of the first checkpoint, found by its norm."""
    by_shape: dict[tuple[int, ...], list[Measured]] = {}
    for each in found:
        if each.found is not None and not each.is_repeated and len(each.pair.a.spec.shape) > 1:
            by_shape.setdefault(each.pair.a.spec.shape, []).append(each)
    candidates: dict[int, tuple[str, LazyTensor]] = {}
    for number, each in enumerate(found):
        if each.found is None or each.found.relative < _MOVED or each.found.odd or not each.found.norm_b:
            continue
        for other in by_shape.get(each.pair.a.spec.shape, ()):
            assert other.found is not None
            is_alike = math.isclose(other.found.norm_a, each.found.norm_b, rel_tol=_SAME_NORM)
            if other.pair is not each.pair and is_alike and number not in candidates:
                node = LazyTensor.make(Difference(str(number)), other.pair.a, each.pair.b)
                candidates[number] = other.pair.first.name, node
    if not candidates:
        return list(found)
    seen = watch_all("looking for moved tensors", [node for _, node in candidates.values()], workers, control)
    result = list(found)
    for number, (name, _) in candidates.items():
        if not TensorDifference.from_note(seen.notes[str(number)]).changed:
            result[number] = replace(found[number], moved_from=name)
    return result
