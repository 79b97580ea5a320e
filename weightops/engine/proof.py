"""Sources on servers and in caches: how much of them is read, and proof that it is what they should hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weightops.checkpoint import Copied, Sidecar
from weightops.engine.control import Control
from weightops.engine.finish import write_small
from weightops.engine.records import ProofRecord
from weightops.engine.staging import Staging
from weightops.engine.stream import BLOCK_NBYTES
from weightops.formats.layout import Data
from weightops.formats.sniff import check_head
from weightops.io.digests import FileDigests
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor, Op
from weightops.ops.measures.witness import Witness
from weightops.ops.stored import Checked
from weightops.plan import Plan
from weightops.stores.reader import FileReader
from weightops.stores.store import SKIPPED_NBYTES, WritableStore
from weightops.stores.stores import Stores

_UNREAD_NBYTES = 1 << 20
_UNREAD_SHARE = 10
"""A file counts as read if no more than this, or one part in so many, was left out: a header, a few buffers."""


@dataclass
class _Reading:
    """What is read of a file: its ranges, and whether each of them is proven right by more than the file's digest."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    guarded: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes in the ranges; those in several of them once."""
        total = end = 0
        for start, stop in sorted(self.ranges):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
        return total

    @property
    def passed(self) -> int:
        """How far the bytes pass in order if the ranges are read in theirs."""
        position = 0
        for start, stop in self.ranges:
            if start - position <= SKIPPED_NBYTES:
                position = max(position, stop)
        return position

    def is_partial(self, file: SourceFile) -> bool:
        """Whether much of the file is not read at all, on purpose."""
        return file.nbytes - self.nbytes > max(_UNREAD_NBYTES, file.nbytes // _UNREAD_SHARE)

    def must_prove(self, file: SourceFile) -> bool:
        """Whether only the file's digest can tell that what was read of it is right."""
        return bool(file.digest) and not self.guarded and not self.is_partial(file)


def _readings(tensors: Iterable[LazyTensor]) -> dict[SourceFile, _Reading]:
    """What the tensors read of each file that has to be proven, in order of first use."""
    found: dict[SourceFile, _Reading] = {}
    for tensor in tensors:
        for op, guarded in _readers(tensor, False):
            if op.source is not None and op.source.is_remote:
                reading = found.setdefault(op.source, _Reading())
                reading.ranges.append(op.extent)
                reading.guarded &= guarded
    return found


def _readers(tensor: LazyTensor, guarded: bool) -> Iterator[tuple[Op, bool]]:
    """The ops that read files, and whether what they read must be right for the run to succeed.

    It must, where the CRC-32 of its archive member is checked, or the digest of what is made of it.
    """
    op = tensor.op
    guarded = guarded or isinstance(op, Checked) or (isinstance(op, Witness) and op.expect is not None and op.is_needed)
    if op.source is not None:
        yield op, guarded
    if not isinstance(op, Checked):
        for source in tensor.inputs:
            yield from _readers(source, guarded)


def _in_order(plan: Plan) -> Iterator[LazyTensor]:
    """The tensors in the order in which one worker evaluates them."""
    yield from plan.watch
    for shard in plan.shards:
        yield from (shard.tensors[piece.name] for piece in plan.layout(shard).pieces if isinstance(piece, Data))


def fetched_nbytes(plan: Plan) -> int:
    """Bytes of weights that come over the network with one worker; what is watched first comes again if it is used."""
    if not any(file.is_on_server for file in plan.sources):
        return 0
    phases = (plan.watch, [tensor for _, tensor in plan.tensors])
    fetched = [found for phase in phases for found in _readings(phase).items() if found[0].is_on_server]
    again = [found for found in _readings(_in_order(plan)).items() if found[0].is_on_server]
    return sum(reading.nbytes for _, reading in fetched) + sum(
        file.nbytes - reading.passed for file, reading in again if reading.must_prove(file)
    )


def fetch_sidecars(
    sidecars: Mapping[str, Sidecar], algorithms: Collection[str], store: WritableStore, control: Control
) -> dict[str, FileDigests]:
    """Write the small files that come from elsewhere; raises as `Remote.read` does if one is not as expected."""
    found = {}
    for name, sidecar in sidecars.items():
        if isinstance(sidecar, Copied) and sidecar.file.is_remote:
            control.check()
            data = control.stores.read(sidecar.file)
            if not sidecar.file.digest:
                check_head(data, sidecar.file.shown)
            found[name] = write_small(store, name, data, algorithms)
    return found


def note_proven(plan: Plan, staging: Staging, stores: Stores) -> None:
    """Journal the digests that have come out right, so that a later run need not fetch these files again."""
    proven = {file.digest for file in plan.sources if stores.is_proven(file)}
    if new := sorted(proven - _noted(staging)):
        staging.note(ProofRecord(digests=new))


def _noted(staging: Staging) -> set[str]:
    return {digest for record in staging.records if isinstance(record, ProofRecord) for digest in record.digests}


def prove(plan: Plan, staging: Staging, control: Control) -> tuple[str, ...]:
    """Hold every file on a server or in a cache that was read against its digest; what is left unproven, in sentences.

    Most have been by now, as their bytes passed. Of others the bytes that did not pass in order are read once more:
    with several workers, after a run that was cut short, from files in an unusual order. Torch archives whose CRC-32s
    have been checked, and deltas that gave the digests they should, need none of this. Raises `Differs`.
    """
    return _hold(_in_order(plan), control, _noted(staging))


def hold(tensors: Iterable[LazyTensor], control: Control) -> tuple[str, ...]:
    """As `prove` does, where there is no plan: `tensors` are all that was evaluated, in that order."""
    tensors = list(tensors)
    try:
        return _hold(tensors, control)
    finally:
        # Who reads the files another time has to prove them anew.
        for file in _readings(tensors):
            control.stores.forget(file)


def _hold(tensors: Iterable[LazyTensor], control: Control, proven: Collection[str] = ()) -> tuple[str, ...]:
    wanting = []
    warnings = []
    for file, reading in _readings(tensors).items():
        if reading.guarded or control.stores.is_proven(file) or file.digest in proven:
            continue
        if reading.must_prove(file):
            wanting.append(file)
        else:
            warnings.append(_why_unproven(file))
    if wanting:
        _read_again(wanting, control)
    return tuple(warnings)


def to_be_proven(tensors: Iterable[LazyTensor]) -> tuple[SourceFile, ...]:
    """The files that only their own digest can prove, if all of the tensors are read."""
    return tuple(file for file, reading in _readings(tensors).items() if reading.must_prove(file))


def prove_files(files: Sequence[SourceFile], control: Control) -> None:
    """Read files from their beginnings to their ends, and hold them against their digests; raises `Differs`."""
    try:
        _read_again(files, control)
    finally:
        for file in files:
            control.stores.forget(file)


def unproven(tensors: Iterable[LazyTensor]) -> tuple[str, ...]:
    """What `hold` will leave unproven when all of the tensors have been read, in sentences."""
    found = _readings(tensors).items()
    return tuple(_why_unproven(file) for file, each in found if not each.guarded and not each.must_prove(file))


def _why_unproven(file: SourceFile) -> str:
    if file.digest:
        return f"{file.shown}: read in part: not held against its {file.digest.partition(':')[0]}"
    return f"{file.shown}: the server names no digest that it could be held against"


def _read_again(files: Sequence[SourceFile], control: Control) -> None:
    """Read files from where their digests stand to their ends."""

    def position(file: SourceFile) -> int:
        return control.stores.reader_of(file).proven_nbytes(file)

    buffer = memoryview(bytearray(BLOCK_NBYTES))
    control.progress.start("checking", sum(file.nbytes - position(file) for file in files))
    with FileReader(control.stores) as reader:
        for file in files:
            while (start := position(file)) < file.nbytes:
                control.check()
                part = buffer[: file.nbytes - start]
                reader.read_into(file, start, part, file.nbytes - start - len(part))
                control.progress.advance(len(part))
    control.progress.stop()
