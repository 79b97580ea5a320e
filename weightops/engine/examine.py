"""The one pass over the values of tensors: the digest and the statistics of each, as values and as JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.digest import watch_all
from weightops.engine.proof import hold
from weightops.engine.stream import BLOCK_NBYTES
from weightops.io.brief import brief
from weightops.layouts.embeddings import has_rows_of_tokens
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.ggml.values import BlockValues
from weightops.ops.measures.statistics import TensorStatistics, has_statistics, statistics
from weightops.ops.measures.witness import witness
from weightops.spec import DType, TensorSpec


class TensorCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Elements of a tensor of each odd kind."""

    nan: int
    inf: int
    zero: int
    subnormal: int


class TensorDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor in what `check --json` and `inspect --json` print.

    `xxh3_128` is null, and all after it left out, where values were not read; all after it also where they are no
    numbers of whole bytes. Extremes and moments are over finite elements, null where there are none. `log2_histogram`
    counts elements by the exponent of their magnitude, which is text because it is the key of an object.
    """

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    file: str | None
    xxh3_128: str | None
    min: int | float | msgspec.UnsetType | None = msgspec.UNSET
    max: int | float | msgspec.UnsetType | None = msgspec.UNSET
    absmax: int | float | msgspec.UnsetType | None = msgspec.UNSET
    mean: float | msgspec.UnsetType | None = msgspec.UNSET
    std: float | msgspec.UnsetType | None = msgspec.UNSET
    zero_rows: int | msgspec.UnsetType | None = msgspec.UNSET
    counts: TensorCounts | msgspec.UnsetType = msgspec.UNSET
    log2_histogram: dict[str, int] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor; without digest and statistics if no values were read, without the latter for packed dtypes."""

    spec: TensorSpec
    file: str | None = None
    xxh3_128: str | None = None
    statistics: TensorStatistics | None = None

    __repr__ = brief

    @property
    def document(self) -> TensorDocument:
        """Spec, digest and statistics as they are printed."""
        own: dict[str, Any] = {"dtype": self.spec.dtype, "shape": self.spec.shape, "nbytes": self.spec.nbytes}
        own |= {"file": self.file, "xxh3_128": self.xxh3_128}
        found = self.statistics
        if found is None:
            return TensorDocument(**own)
        return TensorDocument(
            **own,
            min=found.minimum,
            max=found.maximum,
            absmax=found.absmax,
            mean=found.mean,
            std=found.std,
            zero_rows=found.zero_rows,
            counts=TensorCounts(nan=found.nan, inf=found.infinite, zero=found.zero, subnormal=found.subnormal),
            log2_histogram={str(exponent): n for exponent, n in sorted(found.histogram.items())},
        )


def unread(checkpoint: Checkpoint) -> dict[str, TensorReport]:
    """What headers say of every tensor."""
    return {name: TensorReport(tensor.spec, checkpoint.shards.get(name)) for name, tensor in checkpoint.items()}


def examine(
    checkpoint: Checkpoint, workers: int | None, control: Control, *, what: str = "checking"
) -> dict[str, TensorReport]:
    """Digest and statistics of every tensor; names that stand for one tensor share what is said of it.

    Every tensor is read once, in blocks, by one thread per core unless `workers` says otherwise. Raises `CorruptInput`
    for what cannot be read, `Differs` for files on servers or in a cache whose digest is wrong.
    """
    labels: dict[LazyTensor, str] = {}
    for name, tensor in checkpoint.items():
        labels.setdefault(tensor, name)
    watched = [_watched(tensor, name) for tensor, name in labels.items()]
    remote = any(node.op.source is not None and node.op.source.is_remote for t in labels for node in t.walk())
    found = watch_all(what, watched, workers or (1 if remote else os.cpu_count() or 1), control)
    hold(labels, control)
    reports = {
        tensor: TensorReport(
            tensor.spec,
            checkpoint.shards.get(name),
            found.witnesses[name],
            TensorStatistics.from_note(found.notes[name]) if name in found.notes else None,
        )
        for tensor, name in labels.items()
    }
    return {name: reports[tensor] for name, tensor in checkpoint.items()}


def examine_one(tensor: LazyTensor, name: str, control: Control) -> tuple[TensorReport, tuple[str, ...]]:
    """The same of one tensor, in the thread that asks; and what of its files could not be proven, in sentences.

    A control of its own (`Control(parent=...)`, and `stop`) stops it at the next block.
    """
    watched = _watched(tensor, name)
    with Evaluator(control.stores, control.once) as read:
        for nbytes in read.drain(watched, BLOCK_NBYTES):
            control.check()
            control.progress.advance(nbytes)
        read.files.check_unchanged()
        notes = dict(read.notes.values())
        digest = read.witnesses[name]
    said = hold([tensor], control)
    found = TensorStatistics.from_note(notes[name]) if name in notes else None
    return TensorReport(tensor.spec, None, digest, found), said


def _watched(tensor: LazyTensor, name: str) -> LazyTensor:
    """A tensor whose digest is taken, and if it holds numbers its statistics, when it is evaluated.

    Of ggml's blocks the digest is that of their bytes, and the statistics those of their values.
    """
    if tensor.spec.dtype.is_block:
        values = LazyTensor.make(BlockValues(), witness(tensor, name))
        return statistics(values, name, rows=has_rows_of_tokens(name))
    is_examined = has_statistics(tensor.spec.dtype)
    return witness(
        statistics(tensor, name, rows=has_rows_of_tokens(name)) if is_examined else tensor,
        name,
    )
