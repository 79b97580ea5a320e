"""Random tensors that are the same on every machine, in any order of blocks."""

from __future__ import annotations

import hashlib
import math

from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.spec import DType, TensorSpec

_LINE = 4096
"""Elements that one counter of the generator stands for: what a block begins or ends in is drawn whole."""


class Normal(Op, frozen=True):
    """float32 numbers of N(mean, deviation²), each by its place alone.

    Philox 4x64-10 (Salmon and others, Parallel random numbers: as easy as 1, 2, 3, SC 2011) under a key of `seed` and
    `label`, its counter the number of a run of 4,096 elements; numpy's ziggurat within a run.
    """

    shape: tuple[int, ...]
    mean: float
    deviation: float
    seed: int
    label: str

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(DType.F32, self.shape)

    def grain(self, tensor: LazyTensor) -> int:
        return _LINE * DType.F32.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        words = hashlib.sha256(f"{self.seed}\0{self.label}".encode()).digest()[:16]
        key = np.frombuffer(words, "<u8")
        values = np.frombuffer(out, "<f4")
        first = start // DType.F32.itemsize // _LINE
        for number in range(math.ceil(len(values) / _LINE)):
            line = values[number * _LINE : (number + 1) * _LINE]
            counter = np.array([0, first + number, 0, 0], np.uint64)
            drawn = np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(_LINE, np.float32)
            line[:] = np.float32(self.mean) + np.float32(self.deviation) * drawn[: len(line)]
