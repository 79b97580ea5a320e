"""Tensors as they lie in files: contiguous ranges and strided views."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

from weightops.errors import CorruptInput
from weightops.io.source_file import SourceFile
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 4 << 20
_DENSE_NBYTES = 256 << 10


class Stored(Op, frozen=True):
    """A contiguous range of a file, in C order, little-endian."""

    file: SourceFile
    offset: int
    dtype: DType
    shape: tuple[int, ...]

    @property
    def source(self) -> SourceFile:
        return self.file

    @property
    def extent(self) -> tuple[int, int]:
        return self.offset, self.offset + TensorSpec(self.dtype, self.shape).nbytes

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    def grain(self, tensor: LazyTensor) -> int:
        return self.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        read.files.read_into(self.file, self.offset + start, out, tensor.nbytes - start - len(out))


class Strided(Op, frozen=True):
    """A view with strides (in elements) of a storage that begins at `offset` of a file.

    The reader has checked that every element lies inside the storage.
    """

    file: SourceFile
    offset: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def source(self) -> SourceFile:
        return self.file

    @property
    def extent(self) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self.offset, self.offset + (last + 1) * self.dtype.itemsize

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def _axis(self) -> int:
        """The outermost dimension that can be cut: leading ones of size 1 cannot."""
        return next((i for i, size in enumerate(self.shape) if size > 1), 0)

    def grain(self, tensor: LazyTensor) -> int:
        return math.prod(self.shape[self._axis + 1 :]) * self.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        axis, itemsize, row = self._axis, self.dtype.itemsize, self.grain(tensor)
        shape = (*self.shape[:axis], len(out) // row, *self.shape[axis + 1 :])
        offset = self.offset + start // row * self.strides[axis] * itemsize
        self._gather(np.frombuffer(out, dtype=f"V{itemsize}").reshape(shape), offset, read)

    def _gather(self, target: np.ndarray, offset: int, read: Evaluator) -> None:
        """Fill `target` from the view at `offset`: read its hull if that is small or dense, else halve and recurse."""
        import numpy as np

        itemsize = self.dtype.itemsize
        extents = [(n - 1) * s for n, s in zip(target.shape, self.strides, strict=True)]
        hull = (sum(extents) + 1) * itemsize
        if hull <= max(_DENSE_NBYTES, min(4 * target.nbytes, _CHUNK)):
            with read.scratch(hull) as buffer:
                read.files.read_into(self.file, offset, buffer)
                strides = [s * itemsize for s in self.strides]
                flat = np.frombuffer(buffer, dtype=target.dtype)
                target[...] = np.lib.stride_tricks.as_strided(flat, target.shape, strides)
            return
        axis = extents.index(max(extents))
        half = target.shape[axis] // 2
        low = tuple(slice(None, half) if i == axis else slice(None) for i in range(target.ndim))
        high = tuple(slice(half, None) if i == axis else slice(None) for i in range(target.ndim))
        self._gather(target[low], offset, read)
        self._gather(target[high], offset + half * self.strides[axis] * itemsize, read)


class Checked(Op, frozen=True):
    """Its input, once the CRC-32 of the archive member that holds it has been found right.

    A tensor that is the whole member is checked as it streams by; of any other view the member is read first, once
    for all views and threads.
    """

    crc32: int
    file: SourceFile
    offset: int
    nbytes: int

    @property
    def source(self) -> SourceFile:
        return self.file

    @property
    def extent(self) -> tuple[int, int]:
        return self.offset, self.offset + self.nbytes

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return inputs[0]

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        source = tensor.inputs[0]
        streams = isinstance(source.op, Stored) and (source.op.offset, source.nbytes) == (self.offset, self.nbytes)
        position, crc = read.running.get(tensor, (0, 0))
        if not streams or start > position:
            read.once.do(self, lambda: self._check(self._crc_of_member(read)))
        read(source, start, out)
        if start == position and not read.once.is_done(self):
            position, crc = start + len(out), zlib.crc32(out, crc)
            read.running[tensor] = (position, crc)
            if position == self.nbytes:
                self._check(crc)
                read.once.note(self)

    def _crc_of_member(self, read: Evaluator) -> int:
        crc = 0
        with read.scratch(min(_CHUNK, self.nbytes)) as buffer:
            for start in range(0, self.nbytes, _CHUNK):
                part = buffer[: min(_CHUNK, self.nbytes - start)]
                read.files.read_into(self.file, self.offset + start, part, self.nbytes - start - len(part))
                crc = zlib.crc32(part, crc)
        return crc

    def _check(self, found: int) -> None:
        """Refuse the member unless it is as the archive says."""
        if found == self.crc32:
            return
        raise CorruptInput(
            f"{self.file.shown}: the {self.nbytes} bytes at {self.offset} have CRC-32 {found:08x}, "
            f"the archive says {self.crc32:08x}",
            hint="the file was damaged after it was written: fetch it again",
        )


def without_shared_checks(tensor: LazyTensor) -> LazyTensor:
    """`tensor`, with no check that would read more than itself; for a look at small tensors before all is read."""
    if isinstance(tensor.op, Checked) and tensor.inputs[0].nbytes != tensor.op.nbytes:
        return tensor.inputs[0]
    return LazyTensor(tensor.op, tuple(map(without_shared_checks, tensor.inputs)), tensor.spec)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def view(file: SourceFile, offset: int, dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...]) -> LazyTensor:
    """The tensor of a view: contiguous if it is so in memory (strides of dimensions of size 1 do not count)."""
    natural = contiguous_strides(shape)
    contiguous = all(n == 1 or a == b for n, a, b in zip(shape, strides, natural, strict=True))
    if contiguous or 0 in shape:
        return LazyTensor.make(Stored(file, offset, dtype, shape))
    return LazyTensor.make(Strided(file, offset, dtype, shape, strides))
