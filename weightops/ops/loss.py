"""Casts that count what they lose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.elementwise import Cast
from weightops.ops.libtorch import convert
from weightops.spec import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 1 << 16
_TINY = {DType.F16: 2.0**-14, DType.BF16: 2.0**-126, DType.F32: 2.0**-126, DType.F64: 2.0**-1022}
_TINY |= {DType.F8_E4M3: 2.0**-6, DType.F8_E5M2: 2.0**-14, DType.F8_E4M3FNUZ: 2.0**-7, DType.F8_E5M2FNUZ: 2.0**-15}


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """What a cast did to the elements of a tensor, counted.

    `changed` are no longer the same number, NaNs apart; `overflowed` were finite and are infinite, `flushed` were not
    zero and are; `subnormal` lie below the new type's normal range; `nan` and `infinite` were so before.
    `max_relative_error` is over those that did not overflow.
    """

    elements: int = 0
    changed: int = 0
    overflowed: int = 0
    flushed: int = 0
    subnormal: int = 0
    nan: int = 0
    infinite: int = 0
    max_relative_error: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        counts = {name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__[:-1]}
        return Loss(**counts, max_relative_error=max(self.max_relative_error, other.max_relative_error))


class CountedCast(Cast, frozen=True):
    """A cast whose loss is added up under `label` as it streams by from start to end."""

    label: str

    def passed(self, tensor: LazyTensor, start: int, source: memoryview, out: memoryview, read: Evaluator) -> None:
        if start == read.running.get(tensor, 0):
            read.running[tensor] = start + len(out)
            lost = loss_of(source, tensor.inputs[0].spec.dtype, out, self.dtype, read)
            read.losses[self.label] = read.losses.get(self.label, Loss()) + lost


def loss_of(source: memoryview, old: DType, result: memoryview, new: DType, read: Evaluator) -> Loss:
    """The loss from one block of numbers to another."""
    import numpy as np

    total, count = Loss(), len(source) // old.itemsize
    wide = DType.F64 if DType.F64 in (old, new) else DType.F32
    with read.scratch(_PIECE * wide.itemsize) as a, read.scratch(_PIECE * wide.itemsize) as b:
        for start in range(0, count, _PIECE):
            size = min(_PIECE, count - start)
            left, right = a[: size * wide.itemsize], b[: size * wide.itemsize]
            convert(left, wide, source[start * old.itemsize : (start + size) * old.itemsize], old)
            convert(right, wide, result[start * new.itemsize : (start + size) * new.itemsize], new)
            before, after = (np.frombuffer(x, dtype=wide.value) for x in (left, right))
            total = total + _count(before, after, new)
    return total


def _count(x: NDArray[Any], y: NDArray[Any], new: DType) -> Loss:
    import numpy as np

    nan, infinite = np.isnan(x), np.isinf(x)
    differ = (x != y) & ~nan
    overflowed = int(np.count_nonzero(np.isinf(y) & ~infinite & ~nan))
    size = np.abs(y)
    if not differ.any():
        error = 0.0
    else:
        with np.errstate(all="ignore"):
            relative = np.abs(y[differ].astype(np.float64) / x[differ] - 1)
        error = float(relative[np.isfinite(relative)].max(initial=0.0))
    return Loss(
        elements=x.size,
        changed=int(np.count_nonzero(differ)),
        overflowed=overflowed,
        flushed=int(np.count_nonzero((y == 0) & (x != 0))),
        subnormal=int(np.count_nonzero((size > 0) & (size < _TINY.get(new, 0.0)))),
        nan=int(np.count_nonzero(nan)),
        infinite=int(np.count_nonzero(infinite)),
        max_relative_error=error,
    )


def counted_cast(tensor: LazyTensor, dtype: DType, label: str) -> LazyTensor:
    """`tensor` in `dtype`, with what that loses counted under `label`; itself when it is so already."""
    return tensor if tensor.spec.dtype is dtype else LazyTensor.make(CountedCast(dtype, label), tensor)
