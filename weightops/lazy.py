"""Lazy tensors: what to compute, as a value; nothing is read until somebody asks for bytes.

A tensor is addressed by the bytes of its contiguous little-endian form. Asking for a range of them walks
the tree of ops; every op writes straight into the buffer that it is given, so a block of a few MiB is read,
computed and hashed while it is in cache, and memory does not depend on the size of the tensor.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import msgspec

from weightops.errors import UsageError
from weightops.io.brief import brief
from weightops.io.memory import copy_bytes
from weightops.io.source_file import SourceFile
from weightops.spec import DType, TensorSpec
from weightops.stores.reader import FileReader
from weightops.stores.stores import Stores

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


class Op(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower):
    """A pure function on tensors, with its parameters. Knows no names and no files (`Stored` excepted).

    `grain` is the number of output bytes that cannot be computed apart: an element, a row, or everything.
    """

    registry: ClassVar[dict[str, type[Op]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Op.registry[cls.__name__.lower()] = cls

    @abstractmethod
    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        """The output's dtype and shape."""

    @abstractmethod
    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        """Write the output's bytes `[start, start + len(out))`, a range of whole grains, into `out`."""

    def skip(self, tensor: LazyTensor, read: Evaluator) -> None:
        """Called instead of `fill` on a tensor without bytes; for ops that note what passes by."""

    @property
    def source(self) -> SourceFile | None:
        """The file that this op reads, if it reads one."""
        return None

    @property
    def extent(self) -> tuple[int, int]:
        """From where to where in `source` the bytes lie that it reads."""
        return 0, 0

    @property
    def scratch_nbytes(self) -> int:
        """Memory that it needs at once beyond a block for each input."""
        return 0

    def grain(self, tensor: LazyTensor) -> int:
        """By default that of an elementwise op: whatever its inputs need, counted in its own elements."""
        itemsize = tensor.spec.dtype.itemsize
        return math.lcm(itemsize, *(max(1, t.grain // t.spec.dtype.itemsize) * itemsize for t in tensor.inputs))


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """An op applied to inputs. Equal values are the same bytes, which is how shared tensors stay shared."""

    op: Op
    inputs: tuple[LazyTensor, ...]
    spec: TensorSpec

    __repr__ = brief

    @property
    def grain(self) -> int:
        return self.op.grain(self)

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def read(self, stores: Stores | None = None) -> bytearray:
        """All its bytes: contiguous, little-endian. What lies beyond this machine is read through `stores`."""
        buffer = bytearray(self.nbytes)
        with (stores or Stores()).connected() as stores, Evaluator(stores) as evaluate:
            evaluate(self, 0, memoryview(buffer))
        return buffer

    def numpy(self) -> NDArray[Any]:
        """Its values, in memory of their own. Types that numpy lacks become float32, which holds each of their values.

        Raises `UsageError` for types of less than a byte.
        """
        import numpy as np

        if self.spec.dtype is DType.BF16:
            words = np.frombuffer(self.read(), np.uint16).astype(np.uint32)
            return (words << 16).view(np.float32).reshape(self.spec.shape)
        if self.spec.dtype.is_packed or self.spec.dtype.value.startswith("float8"):
            return self.torch().float().numpy()
        return np.frombuffer(self.read(), np.dtype(self.spec.dtype.value).newbyteorder("<")).reshape(self.spec.shape)

    def torch(self) -> torch.Tensor:
        """Its values as a torch tensor on the CPU, in memory of its own; raises `UsageError` for types torch lacks."""
        import torch

        dtype = getattr(torch, self.spec.dtype.value, None)
        if self.spec.dtype.is_packed or not isinstance(dtype, torch.dtype):
            raise UsageError(f"torch has no tensors of {self.spec.dtype.value}", hint="`read` gives the bytes")
        if not self.nbytes:
            return torch.empty(self.spec.shape, dtype=dtype)
        return torch.frombuffer(self.read(), dtype=torch.uint8).view(dtype).reshape(self.spec.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """For `numpy.asarray`, which always copies here: the values lie in a file."""
        if copy is False:
            raise ValueError("a lazy tensor is read from its file, so that its values are always a copy")
        values = self.numpy()
        return values if dtype is None else values.astype(dtype, copy=False)

    def walk(self) -> Iterator[LazyTensor]:
        """This tensor and everything it is made of."""
        yield self
        for tensor in self.inputs:
            yield from tensor.walk()

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = msgspec.to_builtins(self.op)
        if self.inputs:
            document["inputs"] = [t.to_json() for t in self.inputs]
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        op = msgspec.convert({k: v for k, v in document.items() if k != "inputs"}, Op.registry[document["op"]])
        return cls.make(op, *(cls.from_json(d) for d in document.get("inputs", ())))

    @classmethod
    def make(cls, op: Op, *inputs: LazyTensor) -> Self:
        return cls(op, inputs, op.spec(*(t.spec for t in inputs)))


Evaluate = Callable[[Sequence[LazyTensor]], list[bytes]]
"""Gives the bytes of small tensors, computing several at a time; for operations that depend on values."""


def read_each(tensors: Sequence[LazyTensor]) -> list[bytes]:
    """The bytes of tensors of files on this machine, one after another."""
    return [bytes(tensor.read()) for tensor in tensors]


class Once:
    """Checks that need to be done once, by whichever of several evaluators comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[object, threading.Lock] = {}
        self._done: set[object] = set()

    def is_done(self, key: object) -> bool:
        """Whether it was done."""
        return key in self._done

    def note(self, key: object) -> None:
        """It was done by other means."""
        self._done.add(key)

    def do(self, key: object, check: Callable[[], None]) -> None:
        """Do it, or wait for another to have done it; what `check` raises leaves it undone."""
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._done:
                check()
                self._done.add(key)


class _Kept:
    """The bytes of a tensor that were evaluated last."""

    def __init__(self) -> None:
        self.memory = bytearray()
        self.start = self.nbytes = 0

    def put(self, start: int, data: memoryview) -> None:
        if len(self.memory) < len(data):
            self.memory = bytearray(len(data))
        copy_bytes(memoryview(self.memory)[: len(data)], data)
        self.start, self.nbytes = start, len(data)


class Evaluator:
    """Evaluates lazy tensors in one thread: open files, scratch memory, and what checks have seen so far.

    Files beyond this machine are read through `stores`; evaluators that work on one plan share `once`. An op may start
    as many as `threads` of its own: more than cores wait for each other, and for Python, longer than they compute.
    """

    def __init__(self, stores: Stores | None = None, once: Once | None = None, threads: int = 1) -> None:
        self.threads = threads
        self.files = FileReader(stores)
        self.once = once or Once()
        self.running: dict[object, Any] = {}
        """What the ops that watch bytes go by (digests, CRCs) remember, by node or by op."""
        self.witnesses: dict[str, str] = {}
        """Digests of tensors that were watched to their end, by label."""
        self.notes: dict[LazyTensor, tuple[str, dict[str, float]]] = {}
        """What ops have found out about a tensor: a label, and numbers by name."""
        self._spare: list[bytearray] = []
        self._kept: dict[LazyTensor, _Kept] = {}

    def __call__(self, tensor: LazyTensor, start: int, out: memoryview) -> None:
        """Write the bytes `[start, start + len(out))` of `tensor` into `out`; any range will do."""
        if not out:
            for node in tensor.walk():
                node.op.skip(node, self)
            return
        kept = self._kept.get(tensor) if self._kept else None
        if kept is None:
            self._evaluate(tensor, start, out)
        elif (kept.start, kept.nbytes) == (start, len(out)):
            copy_bytes(out, memoryview(kept.memory)[: len(out)])
        else:
            self._evaluate(tensor, start, out)
            kept.put(start, out)

    def _evaluate(self, tensor: LazyTensor, start: int, out: memoryview) -> None:
        grain, stop = tensor.grain, start + len(out)
        whole_start = start - start % grain
        whole_stop = min(-(-stop // grain) * grain, tensor.nbytes)
        if (whole_start, whole_stop) == (start, stop):
            tensor.op.fill(tensor, start, out, self)
            return
        with self.scratch(whole_stop - whole_start) as whole:
            tensor.op.fill(tensor, whole_start, whole, self)
            copy_bytes(out, whole[start - whole_start : stop - whole_start])

    @contextmanager
    def keeping(self, tensors: Iterable[LazyTensor]) -> Iterator[None]:
        """For the length of a `with` block the last bytes asked of these tensors are kept for who asks for the same."""
        self._kept = {tensor: _Kept() for tensor in tensors}
        try:
            yield
        finally:
            self._kept = {}

    def noted(self, tensors: Iterable[LazyTensor]) -> dict[str, dict[str, float]]:
        """By label, what has been found out about these tensors and what they are made of."""
        nodes = (node for tensor in tensors for node in tensor.walk())
        return dict(self.notes[node] for node in nodes if node in self.notes)

    def whole(self, tensor: LazyTensor) -> bytes:
        """All bytes of a small tensor."""
        buffer = bytearray(tensor.nbytes)
        self(tensor, 0, memoryview(buffer))
        return bytes(buffer)

    def drain(self, tensor: LazyTensor, block_nbytes: int) -> Iterator[int]:
        """Evaluate all of `tensor` for what its ops note on the way; yields the size of each block when done."""
        block = max(block_nbytes // tensor.grain, 1) * tensor.grain if tensor.nbytes else 0
        with self.scratch(min(block, tensor.nbytes)) as buffer:
            for start in range(0, max(tensor.nbytes, 1), max(block, 1)):
                part = buffer[: tensor.nbytes - start]
                self(tensor, start, part)
                yield len(part)

    @contextmanager
    def scratch(self, nbytes: int) -> Iterator[memoryview]:
        """Memory for the length of a `with` block, reused by the next: fresh pages cost more than most ops."""
        buffer = self._spare.pop() if self._spare else bytearray(nbytes)
        if len(buffer) < nbytes:
            buffer = bytearray(nbytes)
        try:
            yield memoryview(buffer)[:nbytes]
        finally:
            self._spare.append(buffer)

    def close(self) -> None:
        self.files.close()
        self._spare.clear()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
