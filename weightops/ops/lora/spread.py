"""Rows that factors of a higher rank begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.merging.inputs import draws
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Uniform(Op, frozen=True):
    """Random float32 numbers between -bound and bound, which depend on the seed, the label and their place alone."""

    shape: tuple[int, ...]
    bound: float
    seed: int
    label: str

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(DType.F32, self.shape)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        count = len(out) // DType.F32.itemsize
        words: NDArray[np.uint32] = draws(f"{self.seed}\0{self.label}", 0, start // DType.F32.itemsize, count)
        np.frombuffer(out, np.float32)[:] = (words / np.float64(1 << 31) - 1) * self.bound
