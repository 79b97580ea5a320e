"""The types of ggml whose elements are points of a grid: IQ1, IQ2 and IQ3, see `weightops.ops.ggml.blocks`.

An index stands for four or eight magnitudes, which signs or a shift are then put upon. The grids are those of the gguf
package, as bytes that are looked up eight at a time.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from weightops.ops.ggml.blocks import Scales, Unpack, field, halves, nibbles
from weightops.spec import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Words = NDArray[np.uint64]

_EIGHTH = 8
"""Values of IQ1 are -1, 0 or 1, and an eighth more or less; their codes are in eighths."""


@cache
def _grid(name: str, times: int = 1) -> NDArray[Any]:
    """The points of a type's grid, each a word with a byte for each magnitude."""
    import numpy as np
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    points = np.ascontiguousarray(kind.grid.reshape(kind.grid_shape) * times).astype(np.int8)
    return points.view(f"u{points.shape[1]}").reshape(-1)


@cache
def _masks() -> Words:
    """By a byte of signs, lowest bit first, a word with 0xFF for each that is negative."""
    import numpy as np

    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.ascontiguousarray(bits * np.uint8(255)).view(np.uint64).reshape(-1)


@cache
def _masks_of_seven() -> Words:
    """The same by seven signs: there is an even number of negative ones, which the eighth follows from."""
    import numpy as np

    seven = np.arange(128)
    odd = sum(seven >> bit & 1 for bit in range(7)) & 1
    return np.asarray(_masks()[seven | odd << 7])


def _place(codes: Bytes, grid: NDArray[Any], indices: NDArray[Any], masks: Words, signs: NDArray[Any]) -> None:
    """Write the points that indices name, with their signs."""
    import numpy as np

    points = codes.view(grid.dtype)
    np.take(grid, indices.reshape(points.shape), out=points, mode="clip")
    words, flips = codes.view(np.uint64), np.empty(codes.view(np.uint64).shape, np.uint64)
    np.take(masks, signs.reshape(flips.shape), out=flips, mode="clip")
    np.bitwise_xor(words, flips, out=words)
    np.subtract(codes, flips.view(np.uint8), out=codes)


def _seven_bits(words: NDArray[Any]) -> NDArray[Any]:
    """The four indices of 7 bits in the lower 28 of each word `[n, k]`."""
    import numpy as np

    return words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & 127


def _quarters(factors: Floats, scales: NDArray[Any]) -> Floats:
    """`factors * (0.5 + scale) * 0.25`, rounded as C rounds it."""
    import numpy as np

    found: Floats = factors * (np.float32(0.5) + scales.astype(np.float32)) * np.float32(0.25)
    return found


def _iq2_xxs(blocks: Bytes, codes: Bytes) -> Scales:
    import numpy as np

    words = field(blocks, 2, 66, "<u4").reshape(len(blocks), 8, 2)
    indices = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    _place(codes, _grid("IQ2_XXS"), indices, _masks_of_seven(), _seven_bits(words[..., 1]))
    return Scales(_quarters(halves(blocks, 0), words[..., 1] >> 28))


def _iq2_xs(blocks: Bytes, codes: Bytes) -> Scales:
    words = field(blocks, 2, 66, "<u2")
    _place(codes, _grid("IQ2_XS"), words & 511, _masks_of_seven(), words >> 9)
    return Scales(_quarters(halves(blocks, 0), nibbles(blocks[:, 66:])))


def _higher(low: Bytes, high: NDArray[Any], shifts: tuple[int, ...], mask: int) -> NDArray[np.uint16]:
    """Indices of more than a byte: `low`, and above it what `high` has for each at one of the shifts."""
    import numpy as np

    above = (high[..., None] >> np.array(shifts, high.dtype) & mask).astype(np.uint16).reshape(low.shape)
    return np.asarray(low | above << 8, np.uint16)


def _iq2_s(blocks: Bytes, codes: Bytes) -> Scales:
    indices = _higher(blocks[:, 2:34], blocks[:, 66:74], (0, 2, 4, 6), 3)
    _place(codes, _grid("IQ2_S"), indices, _masks(), blocks[:, 34:66])
    return Scales(_quarters(halves(blocks, 0), nibbles(blocks[:, 74:])))


def _iq3_xxs(blocks: Bytes, codes: Bytes) -> Scales:
    import numpy as np

    words = field(blocks, 66, 98, "<u4")
    _place(codes, _grid("IQ3_XXS"), blocks[:, 2:66], _masks_of_seven(), _seven_bits(words))
    scales = np.float32(0.5) + (words >> 28).astype(np.float32)
    return Scales(halves(blocks, 0) * scales * np.float32(0.5))


def _iq3_s(blocks: Bytes, codes: Bytes) -> Scales:
    indices = _higher(blocks[:, 2:66], blocks[:, 66:74], tuple(range(8)), 1)
    _place(codes, _grid("IQ3_S"), indices, _masks(), blocks[:, 74:106])
    return Scales(halves(blocks, 0) * (1 + 2 * nibbles(blocks[:, 106:])))


def _shifted(codes: Bytes, indices: NDArray[Any], is_less: NDArray[Any]) -> None:
    """Write the points of IQ1's grid in eighths, each plus or minus one."""
    import numpy as np

    points = codes.view(np.uint64)
    np.take(_grid("IQ1_S", _EIGHTH), indices, out=points, mode="clip")
    by = np.where(is_less, np.int8(-1), np.int8(1)).view(np.uint8)
    per = codes.reshape(*is_less.shape, -1)
    np.add(per, by[..., None], out=per)


def _iq1_s(blocks: Bytes, codes: Bytes) -> Scales:
    import numpy as np

    high = field(blocks, 34, 50, "<u2")
    _shifted(codes, _higher(blocks[:, 2:34], high, (0, 3, 6, 9), 7), high >= 0x8000)
    return Scales(halves(blocks, 0) * (2 * (high >> 12 & 7) + 1) * np.float32(1 / _EIGHTH))


def _iq1_m(blocks: Bytes, codes: Bytes) -> Scales:
    """The float16 is in the upper nibbles of the four words of scales."""
    import numpy as np

    high = nibbles(blocks[:, 32:48])
    _shifted(codes, _higher(blocks[:, :32], high, (0,), 7), high >= 8)
    words = field(blocks, 48, 56, "<u2")
    parts = (words & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)
    whole = np.bitwise_or.reduce(parts, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    scales = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(blocks), 16)
    return Scales(whole * (2 * scales + 1) * np.float32(1 / _EIGHTH))


UNPACK: dict[DType, Unpack] = {
    DType.IQ1_S: _iq1_s,
    DType.IQ1_M: _iq1_m,
    DType.IQ2_XXS: _iq2_xxs,
    DType.IQ2_XS: _iq2_xs,
    DType.IQ2_S: _iq2_s,
    DType.IQ3_XXS: _iq3_xxs,
    DType.IQ3_S: _iq3_s,
}
