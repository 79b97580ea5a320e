"""Ops on rows: resizing a matrix, constant rows, the mean row."""

from __future__ import annotations

import hashlib

from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import as_torch
from weightops.ops.wide import narrowed, widened
from weightops.spec import DType, TensorSpec

_BLOCK_NBYTES = 4 << 20
_SLAB_NBYTES = 24 << 20
_MEAN_NBYTES = 1 << 19
"""What is added up at once for a mean of all rows: small enough to stay in a cache when it has become float32."""


class Given(Op, frozen=True):
    """Bytes that the plan itself holds: small tensors that are computed from a config.

    `number` tells tensors apart that hold the same and are to be stored apart.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes
    number: int = 0

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        out[:] = self.data[start : start + len(out)]


class Repeat(Op, frozen=True):
    """A tensor whose every element has the bytes `element`."""

    dtype: DType
    shape: tuple[int, ...]
    element: bytes

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        unit = np.dtype(f"V{len(self.element)}")
        np.frombuffer(out, dtype=unit)[:] = np.frombuffer(self.element, dtype=unit)


class Fit(Op, frozen=True):
    """The top-left block of its first input in a tensor of `shape`; the rest is its second, a row `[1, ...]`.

    Cuts what is larger and extends what is smaller, in any dimension.
    """

    shape: tuple[int, ...]

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        source, fill = inputs
        result = TensorSpec(source.dtype, self.shape)
        if not self.shape or len(source.shape) != len(self.shape) or fill.shape != (1, *self.shape[1:]):
            raise IncompatibleInputs(f"cannot fit {source} with rows of {fill} into {list(self.shape)}")
        return result

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        source, filler = tensor.inputs
        row = tensor.spec.row_nbytes
        first, count = start // row, len(out) // row
        kept = max(0, min(count, source.spec.shape[0] - first))
        same_rows = source.spec.shape[1:] == self.shape[1:]
        unit = np.dtype(f"V{tensor.spec.dtype.itemsize}")
        if kept < count or not same_rows:
            with read.scratch(row) as one:
                read(filler, 0, one)
                np.frombuffer(out, dtype=f"V{row}")[:] = np.frombuffer(one, dtype=f"V{row}")
        if kept and same_rows:
            read(source, start, out[: kept * row])
        elif kept:
            source_row = source.spec.row_nbytes
            block = tuple(slice(min(a, b)) for a, b in zip(source.spec.shape[1:], self.shape[1:], strict=True))
            with read.scratch(kept * source_row) as buffer:
                read(source, first * source_row, buffer)
                rows = np.frombuffer(buffer, dtype=unit).reshape(kept, *source.spec.shape[1:])
                target = np.frombuffer(out, dtype=unit).reshape(count, *self.shape[1:])
                target[(slice(kept), *block)] = rows[(slice(None), *block)]


class MeanRow(Op, frozen=True):
    """`x.mean(dim=0, keepdim=True)` of a matrix, to the bit as torch computes it on the whole.

    torch sums each column in an order that depends on the rows alone as long as columns come in multiples of
    its vector block, so slabs of columns give the same bits in bounded memory.
    """

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if len(source.shape) != 2 or not source.shape[0]:
            raise IncompatibleInputs(f"{source} has no mean row: expected a matrix")
        return TensorSpec(source.dtype, (1, source.shape[1]))

    def grain(self, tensor: LazyTensor) -> int:
        return tensor.nbytes

    @property
    def scratch_nbytes(self) -> int:
        return _SLAB_NBYTES + _BLOCK_NBYTES

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        (rows, columns), itemsize = source.spec.shape, tensor.spec.dtype.itemsize
        row = source.spec.row_nbytes
        width = min(columns, max(64, _SLAB_NBYTES // (rows * itemsize) // 64 * 64))
        height = max(1, _BLOCK_NBYTES // row)
        unit = np.dtype(f"V{itemsize}")
        means = as_torch(out, source.spec.dtype)
        for left in range(0, columns, width):
            right = min(left + width, columns)
            with read.scratch(rows * (right - left) * itemsize) as slab, read.scratch(height * row) as buffer:
                target = np.frombuffer(slab, dtype=unit).reshape(rows, right - left)
                for top in range(0, rows, height):
                    part = buffer[: min(height, rows - top) * row]
                    read(source, top * row, part)
                    target[top : top + height] = np.frombuffer(part, dtype=unit).reshape(-1, columns)[:, left:right]
                matrix = as_torch(slab, source.spec.dtype).reshape(rows, right - left)
                means[left:right] = matrix.mean(dim=0)


class FiniteMean(Op, frozen=True):
    """The mean of the rows of a matrix of floats, `[1, columns]`: added up in float64 in one pass, rounded once.

    `label` names the matrix where it holds NaN or infinities, which raises `IncompatibleInputs`.
    """

    label: str

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return MeanRow().spec(*inputs)

    def grain(self, tensor: LazyTensor) -> int:
        return tensor.nbytes

    @property
    def scratch_nbytes(self) -> int:
        return 3 * _MEAN_NBYTES

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        (rows, columns), row, dtype = source.spec.shape, source.spec.row_nbytes, source.spec.dtype
        height = max(1, _MEAN_NBYTES // row)
        total = np.zeros(columns)
        with read.scratch(min(height, rows) * row) as buffer, np.errstate(invalid="ignore", over="ignore"):
            for top in range(0, rows, height):
                memory = buffer[: (rows - top) * row]
                read(source, top * row, memory)
                part = widened(memory, dtype).reshape(-1, columns)
                total += np.add.reduce(part, axis=0, dtype=np.float64)
                if not np.isfinite(total).all():
                    odd = int(np.flatnonzero(~np.isfinite(part).all(axis=1))[0]) + top
                    raise IncompatibleInputs(
                        f"{escape(self.label)}: row {odd} holds NaN or infinity, and a mean of all rows is asked for",
                        hint="new rows need another rule: --init copy:TOKEN, zero or normal",
                    )
        narrowed(out, dtype, total / rows)


class NormalRows(Op, frozen=True):
    """Rows of independent normal numbers with mean 0 and deviation `std`: a function of seed, key, row and column.

    Philox 4x64-10 with the row as its counter (Salmon and others, Parallel Random Numbers: As Easy as 1, 2, 3, 2011),
    and Box and Muller's transformation.
    """

    dtype: DType
    shape: tuple[int, int]
    std: float
    seed: int
    key: str

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        row, columns = tensor.spec.row_nbytes, self.shape[1]
        digest = hashlib.blake2b(f"{self.seed}\0{self.key}".encode(), digest_size=16).digest()
        half = -(-columns // 2)
        for number in range(start // row, (start + len(out)) // row):
            generator = np.random.Philox(key=int.from_bytes(digest, "little"), counter=number << 128)
            words = (generator.random_raw(2 * half) >> np.uint64(11)).astype(np.float64)
            radius = np.sqrt(-2 * np.log((words[:half] + 1) * 2.0**-53))
            angle = 2 * np.pi * 2.0**-53 * words[half:]
            values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:columns]
            narrowed(out[number * row - start : (number + 1) * row - start], self.dtype, self.std * values)


def fit(tensor: LazyTensor, shape: tuple[int, ...], element: bytes) -> LazyTensor:
    """`tensor` cut or extended to `shape`, new elements being the bytes `element`."""
    if tensor.spec.shape == shape:
        return tensor
    return LazyTensor.make(Fit(shape), tensor, LazyTensor.make(Repeat(tensor.spec.dtype, (1, *shape[1:]), element)))


def extend_by_mean(tensor: LazyTensor, rows: int) -> LazyTensor:
    """A matrix extended to `rows` rows, each new one the mean of the old (stanford_alpaca's resize)."""
    shape = (rows, *tensor.spec.shape[1:])
    return LazyTensor.make(Fit(shape), tensor, LazyTensor.make(MeanRow(), tensor))
