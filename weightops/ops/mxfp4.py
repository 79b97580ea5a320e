"""MXFP4: floats of four bits (E2M1), of which 32 share a power of two (E8M0), to the bit as compressed-tensors has it.

The exponent of a group is that of its largest magnitude, less two; one that is 7/4 of a power of two or more counts as
the next, so that nothing is beyond the largest of the type, 6, by more than half a step. (OCP Microscaling Formats 1.0
rounds down there, and saturates what is between 7 and 8.) A weight over its scale is rounded to nearest even; what is
negative and becomes zero is -0, as there. Source: `generate_mx_scales` and `MXFP4PackedCompressor` of
compressed-tensors 0.20, which for magnitudes of float16 from 57344 on overflows, and here does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import convert
from weightops.ops.measures.loss import Counting, Loss
from weightops.ops.numbers.float_formats import FORMATS
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

GROUP = 32
"""Weights that share an exponent."""
DTYPES = (DType.F16, DType.BF16, DType.F32)
_PIECE = 1 << 17
_BIAS = 127
_OFFSET = 2
"""The exponent of the largest E2M1 number."""
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TINY = {DType.F16: 2.0**-25, DType.BF16: 2.0**-134, DType.F32: 0.0}
"""What a weight over its scale is at most where it becomes zero in the weight's own type, in which it is divided."""


class Exponents(Op, frozen=True):
    """The exponents uint8 `[..., k / 32]` of weights `[..., k]`: b stands for `2**(b - 127)`. `label` names them.

    Raises `IncompatibleInputs` for a NaN or an infinity, which no exponent brings into four bits.
    """

    label: str

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        _check(self.label, source)
        return TensorSpec(DType.U8, (*source.shape[:-1], source.shape[-1] // GROUP))

    def grain(self, tensor: LazyTensor) -> int:
        return _unit(tensor.inputs[0]) // GROUP

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        dtype, itemsize = source.spec.dtype, source.spec.dtype.itemsize
        with read.scratch(len(out) * GROUP * itemsize) as buffer:
            read(source, start * GROUP * itemsize, buffer)
            for first in range(0, len(out), _PIECE // GROUP):
                part = np.frombuffer(out[first : first + _PIECE // GROUP], np.uint8)
                words = buffer[first * GROUP * itemsize : (first + len(part)) * GROUP * itemsize]
                part[:] = _exponents(words, dtype, self.label)


class Float4(Op, Counting, frozen=True):
    """The codes of weights `[..., k]`, two in a byte and the first in its lower half: uint8 `[..., k / 2]`.

    What that loses of the weights over their scales is added up under `label` as it streams by from start to end.
    """

    label: str

    @property
    def scratch_nbytes(self) -> int:
        return 20 * _PIECE

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        _check(self.label, source)
        return TensorSpec(DType.U8, (*source.shape[:-1], source.shape[-1] // 2))

    def grain(self, tensor: LazyTensor) -> int:
        return _unit(tensor.inputs[0]) // 2

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        dtype, itemsize = source.spec.dtype, source.spec.dtype.itemsize
        position, loss = read.running.get(tensor, (0, Loss()))
        with read.scratch(2 * len(out) * itemsize) as buffer, read.scratch(4 * _PIECE) as wide:
            read(source, 2 * start * itemsize, buffer)
            for first in range(0, len(out), _PIECE // 2):
                part = np.frombuffer(out[first : first + _PIECE // 2], np.uint8)
                words = buffer[2 * first * itemsize : 2 * (first + len(part)) * itemsize]
                exponents = _exponents(words, dtype, self.label)
                memory = wide[: 8 * len(part)]
                if dtype is DType.F32:
                    memory[:] = words
                else:
                    convert(memory, DType.F32, words, dtype)
                values = np.frombuffer(memory, np.float32)
                # A power of two: multiplying by its inverse is dividing by it.
                inverse = np.ldexp(np.float32(1), _BIAS - exponents.astype(np.int32))
                grouped = values.reshape(-1, GROUP)
                grouped *= inverse[:, None]
                codes, found = _rounded(values, _TINY[dtype], loss.max_relative_error)
                loss += found
                np.left_shift(codes[1::2], 4, out=part)
                part |= codes[0::2]
        if start == position:
            read.running[tensor] = start + len(out), loss


def _check(label: str, source: TensorSpec) -> None:
    if len(source.shape) < 2 or source.dtype not in DTYPES or source.shape[-1] % GROUP:
        types = ", ".join(dtype.value for dtype in DTYPES)
        raise IncompatibleInputs(
            f"{escape(label)} is {source}: only matrices of {types} with rows of whole groups of {GROUP} are MXFP4"
        )


def _unit(source: LazyTensor) -> int:
    """Elements that are computed together: whole groups."""
    return math.lcm(GROUP, max(1, source.grain // source.spec.dtype.itemsize))


def _exponents(data: memoryview, dtype: DType, label: str) -> NDArray[np.uint8]:
    """The exponents of the groups in words of a type."""
    import numpy as np

    bits, mantissa = dtype.bits, FORMATS[dtype].precision - 1
    unit = np.dtype(f"<u{dtype.itemsize}")
    magnitudes = np.frombuffer(data, unit) & unit.type((1 << bits - 1) - 1)
    largest = magnitudes.reshape(-1, GROUP).max(axis=1)
    if (largest > FORMATS[dtype].largest).any():
        raise IncompatibleInputs(
            f"{escape(label)} holds a NaN or an infinity: no scale brings that into four bits",
            hint=f"--keep {escape(label)} leaves it as it is",
        )
    field = (largest.astype(np.int64) + (1 << mantissa - 2)) >> mantissa
    if dtype is DType.F16:
        # Below the normal range the scale, 0 in float16, is taken for 1.
        found = np.where(field > 0, field - 15 - _OFFSET, 0) + _BIAS
    else:
        found = np.maximum(field - _OFFSET, 0)
    return found.astype(np.uint8)


def _rounded(values: NDArray[np.float32], tiny: float, known: float) -> tuple[NDArray[np.uint8], Loss]:
    """The codes of numbers, and what that loses of them; `known` is the largest relative error so far."""
    import numpy as np

    magnitudes = np.abs(values)
    codes = (magnitudes > 0.25).view(np.uint8)
    # Half way between two numbers the one with the even code is taken.
    codes += magnitudes >= 0.75
    codes += magnitudes > 1.25
    codes += magnitudes >= 1.75
    codes += magnitudes > 2.5
    codes += magnitudes >= 3.5
    codes += magnitudes > 5.0
    results = np.take(np.array(_NUMBERS, np.float32), codes)
    is_there = magnitudes > tiny
    changed = np.not_equal(results, magnitudes)
    flushed = int(np.count_nonzero(is_there & (codes == 0)))
    if flushed:
        known = 1.0
    elif known < 1 and changed.any():
        known = max(known, float((np.abs(results - magnitudes)[changed] / magnitudes[changed]).max()))
    loss = Loss(
        elements=values.size,
        changed=int(np.count_nonzero(changed)),
        flushed=flushed,
        subnormal=int(np.count_nonzero(codes == 1)),
        max_relative_error=known,
    )
    codes |= (is_there & (values < 0)).view(np.uint8) << np.uint8(3)
    return codes, loss


def mxfp4(tensor: LazyTensor, label: str) -> tuple[LazyTensor, LazyTensor]:
    """Weights `[..., k]` as packed codes, with what that loses counted under `label`; and their exponents."""
    return LazyTensor.make(Float4(label), tensor), LazyTensor.make(Exponents(label), tensor)
