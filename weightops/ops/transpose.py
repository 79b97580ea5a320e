"""Matrices with their rows as columns."""

from __future__ import annotations

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.spec import TensorSpec

_READ_NBYTES = 4 << 20


class Transpose(Op, frozen=True):
    """`[..., n, k]` from `[..., k, n]`. Every row of the one lies across all of the other: a matrix is one piece."""

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if len(source.shape) < 2 or source.dtype.is_packed:
            raise IncompatibleInputs(f"{source} has no rows and columns to exchange")
        *batch, rows, columns = source.shape
        return TensorSpec(source.dtype, (*batch, columns, rows))

    def grain(self, tensor: LazyTensor) -> int:
        *_, columns, rows = tensor.spec.shape
        return max(1, rows * columns * tensor.spec.dtype.itemsize)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        rows, columns = source.spec.shape[-2:]
        size = source.spec.dtype.itemsize
        row = columns * size
        unit = np.dtype(f"u{size}" if size <= 8 else f"V{size}")
        height = min(rows, max(1, _READ_NBYTES // row))
        matrices = np.frombuffer(out, unit).reshape(-1, columns, rows)
        with read.scratch(height * row) as buffer:
            for i, target in enumerate(matrices):
                for top in range(0, rows, height):
                    part = buffer[: min(height, rows - top) * row]
                    read(source, start + (i * rows + top) * row, part)
                    target[:, top : top + height] = np.frombuffer(part, unit).reshape(-1, columns).T


def transposed(tensor: LazyTensor) -> LazyTensor:
    """Matrices with their rows as columns; what was transposed before is as it was."""
    return tensor.inputs[0] if isinstance(tensor.op, Transpose) else LazyTensor.make(Transpose(), tensor)
