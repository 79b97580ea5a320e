"""Numbers of a tensor as float32 or float64 and back, for sums of a few rows: numpy alone, without loading torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.ops.libtorch import convert
from weightops.ops.lora.product import memory_of, to_narrower
from weightops.spec import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray


def widened(buffer: memoryview, dtype: DType) -> NDArray[Any]:
    """The numbers in a buffer of some type of floats, flat: float64 stays what it is, all others become float32."""
    import numpy as np

    if dtype is DType.BF16:
        bits = np.frombuffer(buffer, "<u2").astype("<u4")
        bits <<= 16
        return bits.view(np.float32)
    if dtype in (DType.F64, DType.F32, DType.F16):
        return np.frombuffer(buffer, dtype.value).astype(np.float64 if dtype is DType.F64 else np.float32)
    values = np.empty(len(buffer) // dtype.itemsize, np.float32)
    convert(memory_of(values), DType.F32, buffer, dtype)
    return values


def narrowed(out: memoryview, dtype: DType, values: NDArray[Any]) -> None:
    """`out = values`, which are float64, in a type of floats: rounded once, to the nearest, ties to even."""
    import numpy as np

    if dtype is not DType.BF16:
        with np.errstate(over="ignore"):
            if dtype in (DType.F64, DType.F32, DType.F16):
                np.frombuffer(out, dtype.value)[:] = values
            else:
                to_narrower(out, dtype, memory_of(values), DType.F64)
        return
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float32)
        bits, is_odd = rounded.view("<u4"), rounded != values
        # Rounded to odd first, so that the second rounding is as if it were the only one.
        bits -= (np.abs(rounded) > np.abs(values)).astype("<u4")
        bits |= is_odd.astype("<u4")
        words = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    words[np.isnan(values)] = 0x7FC0
    np.frombuffer(out, "<u2")[:] = words
