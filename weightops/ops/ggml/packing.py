"""How ggml's blocks lie in bytes: parts of codes put together, scales as float16 (`ggml-common.h`).

Codes are `[blocks, elements]` with the elements of a block in their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.errors import CorruptInput
from weightops.spec import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from weightops.ops.ggml.space import Bytes, Floats, Space

    Array = NDArray[Any]

LARGEST = float(1 << 33)
"""Beyond what a block of any type can hold, and below what overflows on the way."""


def lanes(values: Floats, count: int, name: str, space: Space) -> Floats:
    """Flat values as `[count, lanes]`, groups of `count` side by side."""
    import numpy as np

    out = space.floats(name, count, values.size // count)
    np.copyto(out, values.reshape(-1, count).T)
    return out


def by_block(codes: Array, elements: int) -> Bytes:
    """Codes `[positions, lanes]` as `[blocks, elements]`."""
    import numpy as np

    return np.ascontiguousarray(codes.T).reshape(-1, elements)


def halves(values: Floats, dtype: DType) -> NDArray[np.float16]:
    """Scales as float16; raises `CorruptInput` for those that it cannot hold."""
    import numpy as np

    found = values.astype("<f2")
    if not np.isfinite(found).all():
        raise refusal(dtype)
    return found


def refusal(dtype: DType) -> CorruptInput:
    """For numbers that a type cannot hold."""
    return CorruptInput(
        f"cannot quantise to {dtype.value}: a value is not a number, infinite or far too large",
        hint="the weights are damaged, or were never good: look at the run that made them",
    )


def as_bytes(values: Array) -> Bytes:
    """Numbers `[blocks, ...]` as the bytes of each block."""
    import numpy as np

    return np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)


def join(parts: Array, bits: int) -> Bytes:
    """Codes `[..., parts, bytes]` as `[..., bytes]`: the first part in the lowest bits of each byte."""
    found: Bytes = parts[..., 0, :].copy()
    for number in range(1, parts.shape[-2]):
        found |= parts[..., number, :] << (bits * number)
    return found


def nibbles(codes: Array, half: int) -> Bytes:
    """Two codes to a byte, `half` elements apart; what is above 15 is left out."""
    return join((codes & 15).reshape(len(codes), -1, 2, half), 4).reshape(len(codes), -1)


def pairs(codes: Array) -> Bytes:
    """Four codes from 0 to 3 to a byte, 32 elements apart; what is above is left out."""
    return join((codes & 3).reshape(len(codes), -1, 4, 32), 2).reshape(len(codes), -1)


def single_bits(bits: Array) -> Bytes:
    """Eight codes of one bit to a byte, 32 elements apart."""
    return join(bits.reshape(len(bits), 8, 32), 1)


def fifth_bits(codes: Array) -> Bytes:
    """The fifth bit of each of 32 codes, as 4 bytes."""
    import numpy as np

    return np.packbits(codes >> 4, axis=-1, bitorder="little")


def six_bit_pairs(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima of 6 bits in 12 bytes, as Q4_K and Q5_K have them."""
    import numpy as np

    first, last = slice(0, 4), slice(4, 8)
    high = [values[:, first] | (values[:, last] >> 4) << 6 for values in (scales, minima)]
    return np.concatenate([*high, (scales[:, last] & 15) | (minima[:, last] & 15) << 4], axis=1)


def from_six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The scales and minima in them (`get_scale_min_k4`)."""
    import numpy as np

    first, middle, last = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (last & 15) | (first >> 6) << 4], axis=1)
    return scales, np.concatenate([middle & 63, (last >> 4) | (middle >> 6) << 4], axis=1)


def six_bit_scales(codes: Array) -> Bytes:
    """Sixteen scales of 6 bits in 12 bytes, as Q3_K has them."""
    import numpy as np

    high = join((codes >> 4).reshape(-1, 4, 4), 2)
    return np.concatenate([(codes[:, :8] & 15) | (codes[:, 8:] & 15) << 4, high], axis=1)
