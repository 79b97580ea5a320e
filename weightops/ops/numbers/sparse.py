"""Matrices of which only some values are stored, with a bit for each element: compressed-tensors up to 0.12.

Bit i of a row's mask, the lowest of a byte first, says whether element i is stored; others are zero. Sources:
`BitmaskCompressor` and `Sparse24BitMaskCompressor` of compressed-tensors 0.12.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 1 << 20


def _masked(op: Any, values: TensorSpec, mask: TensorSpec) -> TensorSpec:
    rows, columns = op.shape
    if not values.dtype.is_float:
        raise IncompatibleInputs(f"{escape(op.label)}: its values are {values}, expected floating-point numbers")
    if mask != TensorSpec(DType.U8, (rows, -(-columns // 8))):
        raise IncompatibleInputs(f"{escape(op.label)}: {mask} is no mask of {list(op.shape)}")
    return TensorSpec(values.dtype, op.shape)


class Bitmask(Op, frozen=True):
    """A matrix from its values `[stored]`, its mask uint8 `[rows, ceil(columns / 8)]` and, int64 `[rows]`, where in the
    values each row begins.

    Raises `CorruptInput` where mask and offsets do not agree.
    """

    label: str
    shape: tuple[int, ...]

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        values, mask, offsets = inputs
        if len(values.shape) != 1 or offsets.shape != (self.shape[0],) or offsets.dtype is not DType.I64:
            raise IncompatibleInputs(f"{escape(self.label)}: {values} and {offsets} are no rows of {list(self.shape)}")
        return _masked(self, values, mask)

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        values, mask, offsets = tensor.inputs
        rows, columns = self.shape
        itemsize, row = values.spec.dtype.itemsize, self.grain(tensor)
        begins = np.frombuffer(read.whole(offsets), np.int64)
        target = np.frombuffer(out, f"u{itemsize}").reshape(-1, columns)
        target[:] = 0
        first, step = start // row, max(1, _PIECE // columns)
        for top in range(0, len(target), step):
            part = target[top : top + step]
            bits = _bits(mask, first + top, len(part), columns, read)
            low, count = int(begins[first + top]), int(np.count_nonzero(bits))
            stop = int(begins[first + top + len(part)]) if first + top + len(part) < rows else values.spec.numel
            if not 0 <= low <= values.spec.numel or stop - low != count:
                raise CorruptInput(
                    f"{escape(self.label)}: its mask has {count} values from row {first + top} on, row_offsets say "
                    f"{stop - low}",
                    hint="the file is damaged",
                )
            with read.scratch(count * itemsize) as buffer:
                read(values, low * itemsize, buffer)
                part[bits] = np.frombuffer(buffer, f"u{itemsize}")


class Masked24(Op, frozen=True):
    """A matrix from the half of its values that is stored, `[rows, columns / 2]`, and its mask.

    Raises `CorruptInput` for rows whose mask does not have half of the columns.
    """

    label: str
    shape: tuple[int, ...]

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        values, mask = inputs
        if values.shape != (self.shape[0], self.shape[1] // 2) or self.shape[1] % 2:
            raise IncompatibleInputs(f"{escape(self.label)}: {values} is not half of {list(self.shape)}")
        return _masked(self, values, mask)

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        values, mask = tensor.inputs
        columns, itemsize, row = self.shape[1], values.spec.dtype.itemsize, self.grain(tensor)
        target = np.frombuffer(out, f"u{itemsize}").reshape(-1, columns)
        target[:] = 0
        first, step = start // row, max(1, _PIECE // columns)
        for top in range(0, len(target), step):
            part = target[top : top + step]
            bits = _bits(mask, first + top, len(part), columns, read)
            if (bits.sum(axis=1) != columns // 2).any():
                raise CorruptInput(
                    f"{escape(self.label)}: the mask of a row from {first + top} on does not keep two of four",
                    hint="the file is damaged",
                )
            with read.scratch(part.size // 2 * itemsize) as buffer:
                read(values, (first + top) * columns // 2 * itemsize, buffer)
                part[bits] = np.frombuffer(buffer, f"u{itemsize}")


def _bits(mask: LazyTensor, first: int, count: int, columns: int, read: Evaluator) -> NDArray[Any]:
    """Which elements of some rows are stored, `[count, columns]`."""
    import numpy as np

    width = mask.spec.row_nbytes
    with read.scratch(count * width) as buffer:
        read(mask, first * width, buffer)
        rows = np.frombuffer(buffer, np.uint8).reshape(count, width)
        return np.unpackbits(rows, axis=1, bitorder="little")[:, :columns].astype(bool)
