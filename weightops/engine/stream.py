"""Streaming one file: blocks are computed, then digested, then written, each stage in a thread of its own.

A ring of aligned slots goes round: the caller's thread fills a slot with whatever pieces of the layout fall
into it, the digest thread hashes it (and renders what depends on CRCs), the writer thread puts it on disk.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from weightops.engine.control import Control
from weightops.formats.layout import Data, Late, Layout, Literal, Piece
from weightops.io.digests import new_hasher
from weightops.io.direct import DirectFile, aligned_buffer
from weightops.lazy import Evaluator, LazyTensor

BLOCK_NBYTES = 4 << 20
SLOTS = 4


@dataclass(frozen=True)
class Written:
    """What went into a file: its digests by algorithm, and its tensors' xxh3_128 by name."""

    nbytes: int
    digests: dict[str, str]
    tensors: dict[str, str]


@dataclass
class _Slot:
    """One aligned block of the file, and which part of which piece lies where in it."""

    memory: memoryview
    offset: int = 0
    used: int = 0
    parts: list[tuple[Piece, int, memoryview]] = field(default_factory=list)


class _Stage(threading.Thread):
    """Runs `work` on each slot that arrives and passes it on; after a failure, anywhere, only passes them on."""

    def __init__(self, work: Callable[[_Slot], None], failures: list[BaseException]) -> None:
        super().__init__(daemon=True)
        self.inbox: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._work = work
        self._failures = failures

    def run(self) -> None:
        while (slot := self.inbox.get()) is not None:
            if not self._failures:
                try:
                    self._work(slot)
                except BaseException as error:
                    self._failures.append(error)
            self.outbox.put(slot)
        self.outbox.put(None)


class _Digester:
    """Digests of the file and of each tensor in it; renders the late pieces."""

    def __init__(self, layout: Layout, algorithms: Sequence[str]) -> None:
        self._crcs: dict[str, int] | None = {} if layout.needs_crc else None
        self._hashers = {name: new_hasher(name) for name in algorithms}
        self._current: tuple[str, Any] = ("", None)
        self._late: tuple[Late, bytes] | None = None
        self.tensors: dict[str, str] = {
            p.name: xxhash.xxh3_128_hexdigest(b"") for p in layout.pieces if isinstance(p, Data)
        }

    def work(self, slot: _Slot) -> None:
        for piece, start, part in slot.parts:
            if isinstance(piece, Data):
                self._tensor(piece, start, part)
            elif isinstance(piece, Late):
                if self._late is None or self._late[0] is not piece:
                    self._late = (piece, piece.render(self._crcs or {}))
                part[:] = self._late[1][start : start + len(part)]
        for hasher in self._hashers.values():
            hasher.update(slot.memory[: slot.used])

    def _tensor(self, piece: Data, start: int, part: memoryview) -> None:
        if start == 0:
            self._current = (piece.name, xxhash.xxh3_128())
        name, hasher = self._current
        hasher.update(part)
        if self._crcs is not None:
            self._crcs[name] = zlib.crc32(part, self._crcs.get(name, 0))
        if start + len(part) == piece.nbytes:
            self.tensors[name] = hasher.hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        return {name: hasher.hexdigest() for name, hasher in self._hashers.items()}


def write_file(
    path: Path,
    layout: Layout,
    tensors: Mapping[str, LazyTensor],
    read: Evaluator,
    algorithms: Sequence[str],
    control: Control,
) -> Written:
    """Write the file that `layout` describes to `path`, flushed to disk, and say what is in it.

    Raises whatever reading, computing or writing raises; the file is then incomplete and to be thrown away.
    """
    failures: list[BaseException] = []
    digester = _Digester(layout, algorithms)
    file = DirectFile(path, layout.nbytes)

    def put(slot: _Slot) -> None:
        file.write(slot.offset, slot.memory, slot.used)
        control.progress.advance(slot.used)

    digest, write = _Stage(digester.work, failures), _Stage(put, failures)
    write.inbox = digest.outbox
    for _ in range(SLOTS):
        write.outbox.put(_Slot(memoryview(aligned_buffer(BLOCK_NBYTES))))
    digest.start()
    write.start()
    filler = _Filler(write.outbox, digest.inbox, control, failures)
    try:
        for piece in layout.pieces:
            if isinstance(piece, Data):
                _fill_tensor(filler, piece, tensors[piece.name], read)
            else:
                _fill_bytes(filler, piece)
        filler.flush()
    except BaseException as error:
        failures.append(error)
    digest.inbox.put(None)
    digest.join()
    write.join()
    if failures:
        file.abandon()
        raise failures[0]
    file.close()
    tensor_digests = {**digester.tensors, **{a: digester.tensors[n] for a, n in layout.aliases.items()}}
    return Written(layout.nbytes, digester.digests, {name: tensor_digests[name] for name in tensors})


class _Filler:
    """Hands out the file's bytes in order, as parts of one slot after the other."""

    def __init__(
        self,
        free: queue.SimpleQueue[_Slot | None],
        filled: queue.SimpleQueue[_Slot | None],
        control: Control,
        failures: list[BaseException],
    ) -> None:
        self._free, self._filled, self._control, self._failures = free, filled, control, failures
        self._slot: _Slot | None = None
        self._offset = 0

    def _current(self) -> _Slot:
        """The slot in work, with room in it; waits for one to come free."""
        if self._slot is not None and self._slot.used == BLOCK_NBYTES:
            self.flush()
        if self._slot is None:
            self._control.check()
            slot = self._free.get()
            if self._failures or slot is None:
                raise self._failures[0]
            slot.offset, slot.used, slot.parts = self._offset, 0, []
            self._slot = slot
        return self._slot

    @property
    def space(self) -> int:
        """How many bytes lie in one piece of memory now."""
        return BLOCK_NBYTES - self._current().used

    def take(self, piece: Piece, start: int, nbytes: int) -> memoryview:
        """Memory for the next bytes of the file, those of `piece` from `start`: at most `nbytes`, at most `space`."""
        slot = self._current()
        part = slot.memory[slot.used : min(slot.used + nbytes, BLOCK_NBYTES)]
        slot.parts.append((piece, start, part))
        slot.used += len(part)
        self._offset += len(part)
        return part

    def flush(self) -> None:
        """Pass on the slot in work."""
        if self._slot is not None:
            self._filled.put(self._slot)
            self._slot = None


def _fill_bytes(filler: _Filler, piece: Literal | Late) -> None:
    position = 0
    while position < piece.nbytes:
        part = filler.take(piece, position, piece.nbytes - position)
        if isinstance(piece, Literal):
            part[:] = piece.data[position : position + len(part)]
        position += len(part)


def _fill_tensor(filler: _Filler, piece: Data, tensor: LazyTensor, read: Evaluator) -> None:
    """Evaluate a tensor straight into slots, in whole grains where one fits, else by way of scratch memory."""
    grain, position = tensor.grain, 0
    if not piece.nbytes:
        read(tensor, 0, memoryview(b""))
    while position < piece.nbytes:
        rest = piece.nbytes - position
        space = filler.space
        whole = rest if rest <= space else space // grain * grain
        if whole:
            read(tensor, position, filler.take(piece, position, whole))
            position += whole
            continue
        with read.scratch(min(grain, rest)) as buffer:
            read(tensor, position, buffer)
            done = 0
            while done < len(buffer):
                part = filler.take(piece, position + done, len(buffer) - done)
                part[:] = buffer[done : done + len(part)]
                done += len(part)
            position += done
