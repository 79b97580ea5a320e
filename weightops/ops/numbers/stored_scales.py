"""What integers and small floats with scales stand for, and how far apart the values are that they can have.

`Scaled` is for a matrix with scales in a tensor of their own, as fp8 checkpoints have them; ggml's blocks, which hold
theirs, are in `weightops.ops.ggml.values`. It gives the numbers in float32, or (`steps`) the distance from each to the
next that the form could hold, which is twice what rounding to the nearest can have lost.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import convert
from weightops.ops.lora.product import memory_of
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_BLOCK = 128
"""Rows and columns that share a scale in DeepSeek's fp8 checkpoints."""
_FLOATS = {DType.F8_E4M3: (3, -6), DType.F8_E5M2: (2, -14)}
"""Bits of the mantissa, and the smallest exponent."""
_ROUNDED_BEFORE = 1 + 2.0**-4
"""Weights over their fp8 scales are rounded to 16 bits first, which may push a number across the middle of two
others."""
_PIECE = 1 << 17


class Scaled(Op, frozen=True):
    """A matrix `[n, k]` of 8-bit floats or integers times its scales, in float32, or its `steps`.

    Scales are one, one a row `[n]` or `[n, 1]`, or one for each block of 128 x 128.
    """

    steps: bool = False

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        values, scales = inputs
        if len(values.shape) != 2 or values.dtype.bits != 8 or not scales.dtype.is_float or scales.dtype.is_packed:
            raise IncompatibleInputs(f"cannot scale {values} by {scales}")
        rows, columns = values.shape
        blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
        if scales.numel != 1 and scales.shape not in ((rows,), (rows, 1), blocks):
            raise IncompatibleInputs(f"the scales {scales} do not fit {values}")
        return TensorSpec(DType.F32, values.shape)

    def grain(self, tensor: LazyTensor) -> int:
        return math.lcm(max(1, tensor.spec.row_nbytes), tensor.inputs[0].grain * 4)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        source, scales = tensor.inputs
        columns = source.spec.shape[1]
        factors = _as_float32(read.whole(scales), scales.spec.dtype)
        with read.scratch(len(out) // 4) as buffer:
            read(source, start // 4, buffer)
            values = np.frombuffer(out, np.float32)
            if source.spec.dtype.is_float:
                convert(out, DType.F32, buffer, source.spec.dtype)
            else:
                np.copyto(values, np.frombuffer(buffer, source.spec.dtype.value))
        if self.steps:
            _to_steps(values, source.spec.dtype)
        first, matrix = start // 4 // columns, values.reshape(-1, columns)
        if scales.spec.numel == 1:
            matrix *= factors[0]
        elif scales.spec.numel == source.spec.shape[0]:
            matrix *= factors[first : first + len(matrix), None]
        else:
            wide = np.repeat(factors.reshape(scales.spec.shape), _BLOCK, axis=1)[:, :columns]
            for top in range(0, len(matrix), _BLOCK):
                part = matrix[top : top + _BLOCK]
                part *= wide[(first + top + np.arange(len(part))) // _BLOCK]


def _as_float32(data: bytes, dtype: DType) -> Floats:
    import numpy as np

    found = np.empty(len(data) // dtype.itemsize, np.float32)
    convert(memory_of(found), DType.F32, memoryview(bytearray(data)), dtype)
    return found


def _to_steps(values: Floats, dtype: DType) -> None:
    """Put in the place of each value its distance from the next."""
    import numpy as np

    if dtype not in _FLOATS:
        values[:] = 1.0
        return
    bits, lowest = _FLOATS[dtype]
    for start in range(0, values.size, _PIECE):
        part = values[start : start + _PIECE]
        exponents = np.where(part == 0, lowest, np.maximum(np.frexp(part)[1] - 1, lowest)) - bits
        part[:] = np.ldexp(np.float32(_ROUNDED_BEFORE), exponents)


class GroupSteps(Op, frozen=True):
    """The quantisation steps `[n, k]` of a GPTQ module, float32, from its scales `[g, n]` and g_idx if there is one."""

    columns: int
    group_size: int

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(DType.F32, (inputs[0].shape[1], self.columns))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        state = read.running.get(tensor)
        if state is None:
            scales, *index = tensor.inputs
            factors = np.abs(_as_float32(read.whole(scales), scales.spec.dtype)).reshape(scales.spec.shape)
            groups = (
                np.frombuffer(read.whole(index[0]), np.int32) if index else np.arange(self.columns) // self.group_size
            )
            state = read.running[tensor] = np.ascontiguousarray(factors.T), groups.clip(0, len(factors) - 1)
        factors, groups = state
        row = tensor.spec.row_nbytes
        first, count = start // row, len(out) // row
        np.take(factors[first : first + count], groups, axis=1, out=np.frombuffer(out, np.float32).reshape(count, -1))
        if start + len(out) == tensor.nbytes:
            del read.running[tensor]
