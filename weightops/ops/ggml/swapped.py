"""Tensors that a big-endian machine wrote, in the order of bytes that all others have.

In ggml's blocks each number of several bytes is turned round by itself, as `ggml-common.h` declares them and
`gguf_convert_endian` of llama.cpp does it for the types that it knows.
"""

from __future__ import annotations

import math

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.spec import DType, TensorSpec

Field = tuple[int, int, int]
"""The first byte of some numbers in a block, how many there are, and the bytes of each."""
_FIELDS: dict[DType, tuple[Field, ...]] = {
    **dict.fromkeys((DType.Q8_0, DType.Q4_0, DType.Q1_0, DType.Q2_0, DType.IQ4_NL), ((0, 1, 2),)),
    **dict.fromkeys((DType.Q4_1, DType.Q8_1, DType.Q4_K, DType.Q5_K), ((0, 2, 2),)),
    DType.Q5_0: ((0, 1, 2), (2, 1, 4)),
    DType.Q5_1: ((0, 2, 2), (4, 1, 4)),
    DType.Q2_K: ((80, 2, 2),),
    DType.Q3_K: ((108, 1, 2),),
    DType.Q6_K: ((208, 1, 2),),
    DType.Q8_K: ((0, 1, 4), (260, 16, 2)),
    DType.IQ1_S: ((0, 1, 2), (34, 8, 2)),
    DType.IQ1_M: ((48, 4, 2),),
    DType.IQ2_XS: ((0, 33, 2),),
    DType.IQ2_S: ((0, 1, 2),),
    DType.IQ3_XXS: ((0, 1, 2), (66, 8, 4)),
    DType.IQ3_S: ((0, 1, 2),),
    DType.IQ4_XS: ((0, 2, 2),),
    DType.TQ1_0: ((52, 1, 2),),
    DType.TQ2_0: ((64, 1, 2),),
    DType.MXFP4: (),
    DType.NVFP4: (),
}
"""IQ2_XXS is missing: it has words of 16 bits, in which C writes and reads numbers of 32 bits and single bytes."""


class Swapped(Op, frozen=True):
    """Its input with the bytes of every number in the other order; raises `IncompatibleInputs` for IQ2_XXS."""

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if not can_swap(source.dtype):
            raise IncompatibleInputs(f"the order of the bytes in {source} cannot be changed")
        return source

    def grain(self, tensor: LazyTensor) -> int:
        return math.lcm(_nbytes(tensor.spec.dtype), tensor.inputs[0].grain)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        dtype = tensor.spec.dtype
        read(tensor.inputs[0], start, out)
        blocks = np.frombuffer(out, np.uint8).reshape(-1, _nbytes(dtype))
        for first, count, width in _FIELDS.get(dtype, ((0, 1, dtype.itemsize),)):
            numbers = blocks[:, first : first + count * width].reshape(len(blocks), count, width)
            blocks[:, first : first + count * width] = numbers[..., ::-1].reshape(len(blocks), -1)


def can_swap(dtype: DType) -> bool:
    """Whether it is known where the numbers are."""
    return dtype in _FIELDS or not dtype.is_packed


def _nbytes(dtype: DType) -> int:
    """Bytes of what has its numbers at the same places: a block, or an element."""
    return dtype.block[1] if dtype.is_packed else dtype.itemsize
