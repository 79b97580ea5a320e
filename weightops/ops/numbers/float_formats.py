"""Floating-point types as bits: a sign, an exponent, a significand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.ops.libtorch import convert
from weightops.spec import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Format(NamedTuple):
    """Numbers of a type as bits: the sign, the exponent, and the significand less its leading bit."""

    precision: int
    """Bits of the significand."""
    largest: int
    """The bits of the largest number; above it stand infinity and NaNs."""

    @property
    def normal(self) -> int:
        """The bits of the smallest number of the normal range."""
        return 1 << (self.precision - 1)


FORMATS = {
    DType.F8_E4M3: Format(4, 0x7E),
    DType.F8_E5M2: Format(3, 0x7B),
    DType.F8_E4M3FNUZ: Format(4, 0x7F),
    DType.F8_E5M2FNUZ: Format(3, 0x7F),
    DType.F16: Format(11, 0x7BFF),
    DType.BF16: Format(8, 0x7F7F),
    DType.F32: Format(24, 0x7F7FFFFF),
    DType.F64: Format(53, 0x7FEFFFFFFFFFFFFF),
}
"""The types that numbers can be cast to, with what is lost counted."""


def sign_of(dtype: DType) -> int:
    """The bit of the sign."""
    return 1 << (dtype.bits - 1)


def largest_number(dtype: DType) -> float:
    """The largest finite number of a type."""
    import numpy as np

    number = np.empty(1, np.float64)
    bits = bytearray(FORMATS[dtype].largest.to_bytes(dtype.itemsize, "little"))
    convert(number.data.cast("B"), DType.F64, memoryview(bits), dtype)
    return float(number[0])


def strip_signs(results: Array, dtype: DType, out: Array) -> None:
    """The bits without the sign, in the order of the numbers' magnitudes, with infinity and NaNs above them."""
    import numpy as np

    sign = results.dtype.type(sign_of(dtype))
    np.bitwise_and(results, ~sign, out=out)
    if dtype in (DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ):  # whose only NaN is where -0 is in others
        out[results == sign] = sign
