"""The numbers that words of 8 and 16 bits stand for, in every dtype of that size.

Sources: IEEE 754; Micikevicius et al. 2022, "FP8 formats for deep learning" (E4M3, E5M2); Noune et al. 2022, "8-bit
numerical formats for deep neural networks" (FNUZ); OCP Microscaling Formats 1.0 (E8M0).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from weightops.spec import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MINIFLOATS = {DType.F8_E4M3: (3, 7), DType.F8_E4M3FNUZ: (3, 8), DType.F8_E5M2: (2, 15), DType.F8_E5M2FNUZ: (2, 16)}
"""Bits of the mantissa, and bias of the exponent."""
SMALLEST_NORMAL = {DType.F16: -14, DType.BF16: -126, DType.F32: -126, DType.F64: -1022}
SMALLEST_NORMAL |= {dtype: 1 - bias for dtype, (_, bias) in _MINIFLOATS.items()}
"""Its binary logarithm, for the types that have subnormal numbers below it."""


@cache
def values_of(dtype: DType) -> NDArray[np.float64]:
    """The number that each word of 8 or 16 bits stands for."""
    import numpy as np

    nbytes = dtype.itemsize
    words: NDArray[Any] = np.arange(1 << 8 * nbytes, dtype=np.uint32)
    values: NDArray[np.float64]
    with np.errstate(all="ignore"):  # NaNs among them are signalling ones
        match dtype:
            case DType.F16:
                values = words.astype(np.uint16).view(np.float16).astype(np.float64)
            case DType.BF16:
                values = (words << 16).view(np.float32).astype(np.float64)
            case DType.F8_E5M2:
                values = (words << 8).astype(np.uint16).view(np.float16).astype(np.float64)
            case DType.BOOL:
                values = (words != 0).astype(np.float64)
            case DType.F8_E8M0:
                values = np.where(words < 0xFF, np.ldexp(np.ones(256), words.astype(np.int32) - 127), np.nan)
            case DType.F8_E4M3 | DType.F8_E4M3FNUZ | DType.F8_E5M2FNUZ:
                values = _minifloats(dtype)
            case _:
                kind = "i" if dtype in (DType.I8, DType.I16) else "u"
                values = words.astype(f"u{nbytes}").view(f"{kind}{nbytes}").astype(np.float64)
    return values


def _minifloats(dtype: DType) -> NDArray[np.float64]:
    """8-bit floating-point numbers without infinities: NaN is all ones, or in the FNUZ types minus zero."""
    import numpy as np

    bits, bias = _MINIFLOATS[dtype]
    values = small_floats(bits, bias, 8)
    values[[0x7F, 0xFF] if dtype is DType.F8_E4M3 else [0x80]] = np.nan
    return values


def small_floats(mantissa_bits: int, bias: int, width: int) -> NDArray[np.float64]:
    """The number that each byte stands for as a float of `width` bits, all of whose words are numbers.

    Bits above them are not looked at.
    """
    import numpy as np

    words = np.arange(256, dtype=np.int32) & (1 << width) - 1
    magnitudes = words & (1 << width - 1) - 1
    exponent, fraction = magnitudes >> mantissa_bits, magnitudes & (1 << mantissa_bits) - 1
    mantissa = np.where(exponent, fraction + (1 << mantissa_bits), fraction)
    magnitude = np.ldexp(mantissa.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    values: NDArray[np.float64] = np.where(words == magnitudes, magnitude, -magnitude)
    return values
