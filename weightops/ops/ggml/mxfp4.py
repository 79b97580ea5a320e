"""MXFP4 as gpt-oss publishes it in the blocks that ggml has for it: the same codes and scales, in another order.

Source: llama.cpp's convert_hf_to_gguf (`repack_mxfp4` of GptOssModel).
"""

from __future__ import annotations

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.spec import DType, TensorSpec

_CODES, _BLOCK = 32, 17
"""Elements of a block, and its bytes: the scale, and then a byte for elements j and j + 16."""


class Mxfp4Blocks(Op, frozen=True):
    """Every `step`th row from `first` on, `[e, n / step, 32 * g]`, of codes `[e, n, g, 16]` and their scales
    `[e, n, g]`, in which a byte of codes is two elements that follow each other.
    """

    first: int = 0
    step: int = 1

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        codes, scales = inputs
        if (
            (codes.dtype, scales.dtype) != (DType.U8, DType.U8)
            or codes.shape != (*scales.shape, _CODES // 2)
            or len(codes.shape) != 4
            or codes.shape[1] % self.step
        ):
            raise IncompatibleInputs(f"{codes} and {scales} are no codes and scales of MXFP4")
        experts, rows, groups = scales.shape
        return TensorSpec(DType.MXFP4, (experts, rows // self.step, groups * _CODES))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.inputs[1].spec.shape[2] * _BLOCK)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        codes, scales = tensor.inputs
        groups = scales.spec.shape[2]
        row, half = groups * _BLOCK, _CODES // 2
        begin, count = start // row * self.step + self.first, len(out) // row
        rows = (count - 1) * self.step + 1
        with read.scratch(rows * groups * half) as packed, read.scratch(rows * groups) as exponents:
            read(codes, begin * groups * half, packed)
            read(scales, begin * groups, exponents)
            pairs = np.frombuffer(packed, np.uint8).reshape(rows, groups, half)[:: self.step]
            target = np.frombuffer(out, np.uint8).reshape(count, groups, _BLOCK)
            target[..., 0] = np.frombuffer(exponents, np.uint8).reshape(rows, groups)[:: self.step]
            elements = np.empty((count, groups, _CODES), np.uint8)
            elements[..., ::2], elements[..., 1::2] = pairs & 15, pairs >> 4
            target[..., 1:] = elements[..., :half] | elements[..., half:] << 4
