"""Streaming files: blocks are computed, then digested, then written, each stage in a thread of its own.

A ring of aligned slots goes round: the caller's thread fills a slot with whatever pieces of the layout fall
into it, the digest thread hashes it (and renders what depends on CRCs), the writer thread puts it on disk.
Files that are made of the same tensors are written side by side, each block of what they share computed once.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from weightops.engine.coder import Coder
from weightops.engine.control import Control
from weightops.engine.joint import common_block, common_nodes, first_read, interleave
from weightops.formats.layout import Coded, Data, Late, Layout, Lengths, Literal, Piece
from weightops.formats.safetensors import SharingLayout
from weightops.io.digests import new_hasher
from weightops.io.escape import escape
from weightops.io.memory import copy_bytes
from weightops.io.platform.machine import page_memory
from weightops.lazy import Evaluator, LazyTensor
from weightops.stores.store import Target, WritableStore

BLOCK_NBYTES = 4 << 20
_ON_THEIR_WAY = 3


@dataclass(frozen=True)
class Written:
    """What went into a file, which lacks its name yet: its digests by algorithm, its tensors' xxh3_128 by name."""

    target: Target
    nbytes: int
    digests: dict[str, str]
    tensors: dict[str, str]


@dataclass
class _Slot:
    """One aligned block of the file, and which part of which piece lies where in it."""

    memory: memoryview
    stream: _Stream = field(init=False)
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
            p.name: xxhash.xxh3_128_hexdigest(b"") for p in layout.pieces if isinstance(p, Data | Coded)
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


@dataclass(frozen=True)
class File:
    """What is to be written where: `tensors` by the names in `layout`; `algorithms` of the digests that are wanted."""

    store: WritableStore
    name: str
    layout: Layout
    tensors: Mapping[str, LazyTensor]
    algorithms: Sequence[str] = ("xxh3_128",)


def write_files(files: Sequence[File], read: Evaluator, control: Control) -> list[Written]:
    """Write each file, durably, and say what is in it; `commit` of its target gives it its name.

    Everything is computed and digested, also what is not written because its blocks are shared with a source.
    Where the next tensors of several files share inputs, they are computed block by block together.
    Raises whatever reading, computing or writing raises; the files are then incomplete and to be thrown away.
    """
    failures: list[BaseException] = []

    def put(slot: _Slot) -> None:
        slot.stream.target.write(slot.offset, slot.memory, slot.used)
        control.progress.advance(slot.used)

    digest = _Stage(lambda slot: slot.stream.digester.work(slot), failures)
    write = _Stage(put, failures)
    write.inbox = digest.outbox
    ring = [_Slot(memoryview(page_memory(BLOCK_NBYTES))) for _ in range(slots(len(files)))]
    for slot in ring:
        write.outbox.put(slot)
    digest.start()
    write.start()
    streams: list[_Stream] = []
    try:
        for file in files:
            streams.append(_Stream(file, write.outbox, digest.inbox, control, failures))
        for step in interleave([[first_read(t) for t in stream.data] for stream in streams]):
            _fill_together([streams[i] for i in step], read)
        for stream in streams:
            stream.fill_rest()
    except BaseException as error:
        failures.append(error)
    digest.inbox.put(None)
    digest.join()
    write.join()
    for slot in ring:  # which streams hold and slots hold them: their memory would wait for the garbage collector
        vars(slot).clear()
    try:
        if failures:
            raise failures[0]
        return [stream.close() for stream in streams]
    except BaseException:
        for stream in streams:
            stream.target.abandon()
        raise


def slots(files: int) -> int:
    """Blocks of memory for so many files: one that each may have begun, and three on their way."""
    return files + _ON_THEIR_WAY


class _Stream:
    """One file in work: hands out its bytes in order, as parts of one slot after the other."""

    def __init__(
        self,
        file: File,
        free: queue.SimpleQueue[_Slot | None],
        filled: queue.SimpleQueue[_Slot | None],
        control: Control,
        failures: list[BaseException],
    ) -> None:
        self._file = file
        self.digester = _Digester(file.layout, file.algorithms)
        layout = file.layout
        shared = layout.shared if isinstance(layout, SharingLayout) else {}
        self.target = file.store.target(file.name, layout.nbytes, shared, is_most=layout.least_nbytes < layout.nbytes)
        self._pieces = deque(layout.pieces)
        self._free, self._filled, self._control, self._failures = free, filled, control, failures
        self._slot: _Slot | None = None
        self._offset = 0
        self._coder = Coder()

    @property
    def data(self) -> list[LazyTensor]:
        """The tensors that are still to come, in their order."""
        return [self._file.tensors[piece.name] for piece in self._pieces if isinstance(piece, Data | Coded)]

    def next_tensor(self) -> tuple[Data | Coded, LazyTensor]:
        """Fill in what lies before the next tensor, and take that."""
        while not isinstance(piece := self._pieces.popleft(), Data | Coded):
            self._fill_bytes(piece)
        return piece, self._file.tensors[piece.name]

    def fill_rest(self) -> None:
        """Fill in what lies behind the last tensor, and pass it on."""
        for piece in self._pieces:
            assert not isinstance(piece, Data | Coded)
            self._fill_bytes(piece)
        self.flush()

    def close(self) -> Written:
        """Flush to disk what was written, and say what it is."""
        self.target.close(self._offset)
        layout, digests = self._file.layout, {**self.digester.tensors, **self._coder.digests}
        if isinstance(layout, SharingLayout):
            scale, unit = (1e9, "GB") if layout.nbytes >= 1e9 else (1e6, "MB")
            shared = f"{self.target.shared_nbytes / scale:.1f} of {layout.nbytes / scale:.1f} {unit}"
            self._control.progress.note(f"{escape(layout.name)}: {shared} shared with the source")
        digests = {**digests, **{alias: digests[name] for alias, name in layout.aliases.items()}}
        return Written(
            self.target, self._offset, self.digester.digests, {name: digests[name] for name in self._file.tensors}
        )

    def _current(self) -> _Slot:
        """The slot in work, with room in it; waits for one to come free."""
        if self._slot is not None and self._slot.used == BLOCK_NBYTES:
            self.flush()
        if self._slot is None:
            self._control.check()
            slot = self._free.get()
            if self._failures or slot is None:
                raise self._failures[0]
            slot.stream, slot.offset, slot.used, slot.parts = self, self._offset, 0, []
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

    def _fill_bytes(self, piece: Literal | Late | Lengths) -> None:
        if isinstance(piece, Late):
            position = 0
            while position < piece.nbytes:
                position += len(self.take(piece, position, piece.nbytes - position))
            return
        data = piece.data if isinstance(piece, Literal) else piece.render(self._coder.lengths)
        self._put(piece, 0, memoryview(data))

    def evaluate(self, piece: Data | Coded, tensor: LazyTensor, start: int, nbytes: int, read: Evaluator) -> None:
        """Evaluate whole grains of a tensor into slots: straight where they fit, else by way of scratch memory."""
        stop, grain = start + nbytes, tensor.grain
        if isinstance(piece, Coded):
            block = max(1, BLOCK_NBYTES // grain) * grain
            with read.scratch(min(block, nbytes)) as buffer:
                for first in range(start, stop, block):
                    part = buffer[: stop - first]
                    read(tensor, first, part)
                    self.copy(piece, first, part, read.threads)
            return
        while start < stop:
            rest, space = stop - start, self.space
            whole = rest if rest <= space else space // grain * grain
            if whole:
                read(tensor, start, self.take(piece, start, whole))
                start += whole
                continue
            with read.scratch(min(grain, rest)) as buffer:
                read(tensor, start, buffer)
                self.copy(piece, start, buffer)
                start += len(buffer)

    def copy(self, piece: Data | Coded, start: int, data: memoryview, threads: int = 1) -> None:
        """Bytes of a tensor from `start`, which have been evaluated elsewhere; coded by so many threads."""
        if isinstance(piece, Data):
            self._put(piece, start, data)
            return
        self._control.check()  # zeros take no slot, where it is asked otherwise
        before = self._offset
        for coded in self._coder.blocks(piece, start, data, threads):
            self._put(piece, 0, memoryview(coded))
        self._control.progress.advance(len(data) - (self._offset - before))  # of what is saved nothing is left to do

    def _put(self, piece: Piece, start: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            part = self.take(piece, start + done, len(data) - done)
            copy_bytes(part, data[done : done + len(part)])
            done += len(part)


def _fill_together(streams: Sequence[_Stream], read: Evaluator) -> None:
    """Fill in the next tensor of each stream, in blocks of the same elements where there are several."""
    work = [(stream, *stream.next_tensor()) for stream in streams]
    for _, piece, tensor in work:
        if not piece.nbytes:
            read(tensor, 0, memoryview(b""))
    elements = common_block([tensor for _, _, tensor in work])
    shared = common_nodes([tensor for _, _, tensor in work]) if elements else set()
    if not shared:
        for stream, piece, tensor in work:
            stream.evaluate(piece, tensor, 0, piece.nbytes, read)
        return
    with read.keeping(shared):
        for first in range(0, work[0][2].spec.numel, elements):
            for stream, piece, tensor in work:
                itemsize = tensor.spec.dtype.itemsize
                start = first * itemsize
                block = min(elements * itemsize, piece.nbytes - start)
                _fill_block(stream, piece, tensor, start, block, read)


def _fill_block(
    stream: _Stream, piece: Data | Coded, tensor: LazyTensor, start: int, nbytes: int, read: Evaluator
) -> None:
    """Evaluate one block in one piece, for others will ask for the same one."""
    if isinstance(piece, Data) and nbytes <= stream.space:
        read(tensor, start, stream.take(piece, start, nbytes))
        return
    with read.scratch(nbytes) as buffer:
        read(tensor, start, buffer)
        stream.copy(piece, start, buffer, read.threads)
