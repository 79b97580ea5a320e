"""Tensors with their dimensions in another order, in bounded memory."""

from __future__ import annotations

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.arrange import cut
from weightops.spec import TensorSpec

_PIECE_NBYTES = 32 << 20
"""Of the result, what is made at once: the input is read once for each, as far as it holds other parts."""


class Permute(Op, frozen=True):
    """Its input with dimension `axes[i]` as its i-th, as torch's `permute` gives it."""

    axes: tuple[int, ...]

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if sorted(self.axes) != list(range(len(source.shape))) or source.dtype.is_packed:
            raise IncompatibleInputs(f"{source} has no dimensions {list(self.axes)} to put in order")
        return TensorSpec(source.dtype, tuple(source.shape[axis] for axis in self.axes))

    def grain(self, tensor: LazyTensor) -> int:
        row = max(1, tensor.spec.row_nbytes)
        return max(1, min(-(-_PIECE_NBYTES // row) * row, tensor.nbytes))

    @property
    def scratch_nbytes(self) -> int:
        return 2 * _PIECE_NBYTES

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        row, size = tensor.spec.row_nbytes, tensor.spec.dtype.itemsize
        unit = np.dtype(f"V{size}")
        first, count = start // row, len(out) // row
        part = cut(source, self.axes[0], first, first + count)
        target = np.frombuffer(out, unit).reshape(count, *tensor.spec.shape[1:])
        with read.scratch(len(out)) as buffer:
            read(part, 0, buffer)
            target[...] = np.frombuffer(buffer, unit).reshape(part.spec.shape).transpose(self.axes)


def permuted(tensor: LazyTensor, axes: tuple[int, ...]) -> LazyTensor:
    """The tensor with its dimensions in this order; itself where that is its own."""
    return tensor if axes == tuple(range(len(tensor.spec.shape))) else LazyTensor.make(Permute(axes), tensor)
