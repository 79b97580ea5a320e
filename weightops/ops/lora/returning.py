"""How much of a weight comes back when a change that was added to it is taken off again.

With F the weight after the change was added, rounded to a spacing u(F), the weight before is known to half of that: its
rounding error e lies anywhere within. Taking the change off gives W + e, rounded to W's own spacing u(W). So where u(F)
is no larger W comes back, and where it is K times as large (K = 2, 4, ...) it does for one in K; the expected square of
what is off is then (K^2 + 2) / 12 u(W)^2. Spacings are those of the numbers' exponents, of which that of W is taken
from what comes out. In float32, where changes are no finer than weights, a few more in a hundred are off by ties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.lora.product import memory_of, to_wider
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGITS = {DType.F32: (24, -125), DType.F16: (11, -13), DType.BF16: (8, -125)}
"""Bits of the significand, and the exponent of the smallest normal number as frexp counts it."""
_BLOCK = 1 << 20


class Returning(Op, frozen=True):
    """Of a weight with the change and without it, three float64: how many numbers are expected to be those from before
    the change was added, the expected square of what the others are off, and the square of the weight's norm."""

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        changed, result = inputs
        if changed != result or changed.dtype not in _DIGITS:
            raise IncompatibleInputs(f"cannot hold the roundings of {changed} against those of {result}")
        return TensorSpec(DType.F64, (3,))

    def grain(self, tensor: LazyTensor) -> int:
        return tensor.nbytes

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        spec, found = tensor.inputs[0].spec, np.zeros(3)
        size = spec.dtype.itemsize
        for first in range(0, spec.numel, _BLOCK):
            count = min(_BLOCK, spec.numel - first)
            changed, result = (_values(each, first * size, count, read) for each in tensor.inputs)
            found += _expected(changed, result, *_DIGITS[spec.dtype])
        np.frombuffer(out, np.float64)[:] = found


def _values(tensor: LazyTensor, start: int, count: int, read: Evaluator) -> NDArray[Any]:
    import numpy as np

    values = np.empty(count, np.float32)
    with read.scratch(count * tensor.spec.dtype.itemsize) as buffer:
        read(tensor, start, buffer)
        to_wider(memory_of(values), DType.F32, buffer, tensor.spec.dtype)
    return values


def _expected(changed: NDArray[Any], result: NDArray[Any], digits: int, least: int) -> tuple[float, float, float]:
    import numpy as np

    above, own = (np.where(x == 0, least, np.maximum(np.frexp(x)[1], least)) for x in (changed, result))
    coarser = np.maximum(above - own, 0)
    ratio = np.ldexp(1.0, coarser)
    spacing = np.ldexp(1.0, own - digits)
    off = np.where(coarser > 0, (ratio * ratio + 2) / 12 * spacing * spacing, 0.0)
    wide = result.astype(np.float64)
    return float((1 / ratio).sum()), float(off.sum()), float(np.dot(wide, wide))
