"""The tensors of a merge, as a method sees them: read block by block, as often as it needs, computed in threads."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from weightops.io.platform.machine import cores, once_per_process, reuse_freed
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.libtorch import OneThread, as_torch, open_library
from weightops.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

T = TypeVar("T")

PIECE = 1 << 18
"""Elements that are computed at once: few enough for a cache, and enough to hide what calls cost."""
_MAX_HELD_NBYTES = 48 << 20
"""Tensors on servers that are asked for several times are kept in memory, unless they take more together."""


class Inputs:
    """The tensors that are merged into one: of one spec, in the order of the merge file.

    `base` is the place of the base model among them, or None where a method knows none. `key` names the tensor, for
    random draws. Blocks are flat, or `[rows, columns]` by the last dimension with `by_rows`.
    """

    def __init__(
        self, tensors: Sequence[LazyTensor], base: int | None, key: str, read: Evaluator, *, by_rows: bool = False
    ) -> None:
        self.tensors, self.base, self.key, self.by_rows = tuple(tensors), base, key, by_rows
        self._read = read
        self._spare: list[bytearray] = read.running.setdefault("memory of merges", [])
        sources = (node.op.source for tensor in self.tensors for node in tensor.walk())
        is_far = any(source is not None and source.is_remote for source in sources)
        self._is_held = is_far and sum(tensor.nbytes for tensor in self.tensors) <= _MAX_HELD_NBYTES

    @property
    def spec(self) -> TensorSpec:
        return self.tensors[0].spec

    @property
    def name(self) -> str:
        """The tensor's name, which ends the key."""
        return self.key.rpartition("\0")[2]

    @property
    def numel(self) -> int:
        return self.spec.numel

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.spec.shape[-1] if self.spec.shape else 1

    @property
    def others(self) -> list[int]:
        """The places of the models that are not the base."""
        return [i for i in range(len(self.tensors)) if i != self.base]

    @cached_property
    def dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.spec.dtype.value)
        return found

    @cached_property
    def wide(self) -> torch.dtype:
        """float64 for tensors of it, and float32 for all others."""
        import torch

        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def step(self) -> int:
        """Elements of a whole block: whole rows, where blocks are rows."""
        if not self.by_rows:
            return PIECE
        return max(1, PIECE // max(1, self.columns)) * max(1, self.columns)

    def changes(self, blocks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the other models changed of the base, in the tensors' own dtype; the tensors where there is no base."""
        if self.base is None:
            return list(blocks)
        return [blocks[i] - blocks[self.base] for i in self.others]

    def of_others(self, values: Sequence[T]) -> list[T]:
        """Of values for each model those for all but the base."""
        return [values[i] for i in self.others]

    def whole(self) -> list[torch.Tensor]:
        """All tensors, flat; for small ones."""
        return [as_torch(memoryview(buffer), self.spec.dtype) for buffer in self._all]

    @cached_property
    def _all(self) -> tuple[bytearray, ...]:
        memory = tuple(bytearray(self.spec.nbytes) for _ in self.tensors)
        for tensor, buffer in zip(self.tensors, memory, strict=True):
            self._read(tensor, 0, memoryview(buffer))
        return memory

    def over_blocks(self, function: Callable[[list[torch.Tensor], int], T]) -> Iterator[T]:
        """One pass: what `function` makes of each block and the number of its first element, in their order.

        Blocks are always the same ones, so that sums over them are too.
        """
        return self.run(function, 0, self.numel)

    def over_blocks_after(
        self,
        tally: Callable[[Sequence[torch.Tensor]], Any] | None,
        function: Callable[[list[torch.Tensor], int, Any], T],
    ) -> Iterator[T]:
        """The same for a function that gets the sum of what `tally` makes of the blocks before; None without one."""
        before = self.before(lambda blocks, first: tally(self.changes(blocks)), 0, self.numel)[0] if tally else {}
        return self.over_blocks(lambda blocks, first: function(blocks, first, before.get(first)))

    def before(
        self, tally: Callable[[list[torch.Tensor], int], Any], start: int, stop: int, count: Any = None
    ) -> tuple[dict[int, Any], Any]:
        """Of each block from `start` to `stop` what `count` and the tallies before it add up to; and the sum of all."""
        found = {}
        for number, own in enumerate(self.run(tally, start, stop)):
            count = own * 0 if count is None else count
            found[start + number * self.step] = count
            count = count + own
        return found, count

    def run(
        self, function: Callable[[list[torch.Tensor], int], T], start: int, stop: int, step: int | None = None
    ) -> Iterator[T]:
        """The same for elements from `start` to `stop`, block by block from `start`, `step` elements at a time."""
        step = step or self.step
        pending: deque[tuple[Future[T], tuple[bytearray, ...]]] = deque()
        for first in range(start, stop, step):
            if len(pending) > max(1, self._read.threads):
                yield self._done(*pending.popleft())
            count = min(step, stop - first)
            memory, blocks = self._load(first, count)
            pending.append((_pool().submit(_without_grad, function, blocks, first), memory))
        while pending:
            yield self._done(*pending.popleft())

    def _done(self, future: Future[T], memory: tuple[bytearray, ...]) -> T:
        result = future.result()
        self._spare.extend(memory)
        return result

    def _memory(self, nbytes: int) -> bytearray:
        """Memory for a block, of an earlier one if there is some: fresh pages cost more than most passes over them."""
        while self._spare:
            buffer = self._spare.pop()
            if len(buffer) >= nbytes:
                return buffer
        return bytearray(max(nbytes, PIECE * self.spec.dtype.itemsize))

    def _load(self, first: int, count: int) -> tuple[tuple[bytearray, ...], list[torch.Tensor]]:
        itemsize = self.spec.dtype.itemsize
        if self._is_held:
            part = slice(first * itemsize, (first + count) * itemsize)
            return (), [self._block(memoryview(buffer)[part]) for buffer in self._all]
        memory = tuple(self._memory(count * itemsize) for _ in self.tensors)
        blocks = []
        for tensor, buffer in zip(self.tensors, memory, strict=True):
            view = memoryview(buffer)[: count * itemsize]
            self._read(tensor, first * itemsize, view)
            blocks.append(self._block(view))
        return memory, blocks

    def _block(self, memory: memoryview) -> torch.Tensor:
        block = as_torch(memory, self.spec.dtype)
        return block.reshape(-1, self.columns) if self.by_rows else block

    def draws(self, model: int, first: int, count: int) -> NDArray[Any]:
        """Random numbers of 32 bits for the elements from `first` on, for the model at that place of the merge file."""
        return draws(self.key, model, first, count)


def draws(key: str, model: int, first: int, count: int) -> NDArray[Any]:
    """Random numbers of 32 bits for `count` elements of a tensor from `first` on.

    They depend on the key, the model's place and the element alone: Philox 4x64-10 (Salmon and others, Parallel Random
    Numbers: As Easy as 1, 2, 3, 2011) whose counter is the element's number divided by eight.
    """
    import numpy as np

    counter, skipped = divmod(first, 8)
    generator = np.random.Philox(key=_key(key, model), counter=counter)
    words = np.random.Generator(generator).integers(0, 1 << 64, size=-(-(skipped + count) // 2), dtype=np.uint64)
    return words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]


@cache
def _key(key: str, model: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{key}\0{model}".encode(), digest_size=16).digest(), "little")


def _without_grad(function: Callable[[list[torch.Tensor], int], T], blocks: list[torch.Tensor], first: int) -> T:
    import torch

    with torch.inference_mode():
        return function(blocks, first)


@once_per_process
def _pool() -> ThreadPoolExecutor:
    """Threads that compute for all tensors that are in work, as many as cores."""
    reuse_freed(16 * PIECE)
    return ThreadPoolExecutor(cores(), "merge", _prepare)


def _prepare() -> None:
    """Keep torch to the thread that calls it, after it has set its own number of threads."""
    import torch

    torch.get_num_threads()
    library: OneThread | None = open_library(lambda slow, _: OneThread(slow))
    if library is not None:
        library.prepare()
