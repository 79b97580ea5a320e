"""The blocks of ggml as whole numbers and their scales: `value = scale * code`, or less a minimum.

Every type has a function that writes the codes of some blocks, one byte for each element, and returns the scales of
their groups. The order of bits is that of `ggml-common.h` and of `dequantize_row_*` in `ggml-quants.c`; of gguf's
numpy code (`gguf.quants`) it gives the same bits, whatever the scales are.

Codes are unpacked eight at a time, as words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.spec import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the sixteen codes of IQ4_NL and IQ4_XS stand for."""
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what the sixteen codes of E2M1 stand for; code 8 is 0 to ggml, not -0."""


class Scales(NamedTuple):
    """Of each group of elements `[n, groups]`: what its codes are multiplied by, and what is taken off then."""

    factors: Floats
    minima: Floats | None = None
    offsets: Floats | None = None
    """What is added; not the same as taking off its negative where it is NaN."""


Unpack = Callable[["Bytes", "Bytes"], Scales]
"""From blocks `[n, nbytes]`, writes the codes `[n, elements]`."""


def halves(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, as float32 `[n, 1]`."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def field(blocks: Bytes, start: int, stop: int, dtype: Any = "u1") -> NDArray[Any]:
    """Bytes `[start, stop)` of every block in memory of their own, as little-endian numbers of `dtype`."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def spread(codes: Bytes, packed: Bytes, bits: int, run: int) -> None:
    """Write the codes that are `bits` wide: of every `run` bytes first those in the lowest bits, then the next.

    `packed` is contiguous; `run` and the bytes of a block are multiples of eight.
    """
    import numpy as np

    words, step = packed.view(np.uint64), 8 // bits
    mask = np.uint64(((1 << bits) - 1) * 0x0101010101010101)
    out = codes.reshape(len(packed), -1, step, run)
    plane = np.empty_like(words)
    for part in range(step):
        np.right_shift(words, np.uint64(bits * part), out=plane)
        np.bitwise_and(plane, mask, out=plane)
        np.copyto(out[:, :, part], plane.view(np.uint8).reshape(out.shape[0], -1, run))


def _add_bits(codes: Bytes, packed: Bytes, bits: int, shift: int) -> None:
    """Put higher bits, in runs of 32 bytes, upon codes."""
    import numpy as np

    more = np.empty_like(codes)
    spread(more, packed, bits, 32)
    words = more.view(np.uint64)
    np.left_shift(words, np.uint64(shift), out=words)
    np.bitwise_or(codes.view(np.uint64), words, out=codes.view(np.uint64))


def _lower(codes: Bytes, by: int) -> None:
    """Take off `by`; the bytes are then signed."""
    import numpy as np

    np.subtract(codes, np.uint8(by), out=codes)


def _look_up(codes: Bytes, values: tuple[int, ...]) -> None:
    """Put in the place of codes from 0 to 15 what they stand for, two at a time."""
    import numpy as np

    pairs = codes.view(np.uint16)
    np.take(_pairs(values), pairs, out=pairs, mode="clip")


@cache
def _pairs(values: tuple[int, ...]) -> NDArray[np.uint16]:
    """By two codes in the bytes of a word, the two values in those of another."""
    import numpy as np

    table, words = np.array(values, np.int8).view(np.uint8).astype(np.uint16), np.arange(0x1000)
    return np.asarray(table[words & 15] | table[words >> 8] << 8, np.uint16)


def nibbles(packed: Bytes) -> Bytes:
    """The nibbles of bytes `[n, k]`, each byte's lower one first: `[n, 2 k]`."""
    import numpy as np

    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _q8_0(blocks: Bytes, codes: Bytes) -> Scales:
    codes[:] = blocks[:, 2:]
    return Scales(halves(blocks, 0))


def _q8_1(blocks: Bytes, codes: Bytes) -> Scales:
    """The second float16 is a sum, for dot products."""
    codes[:] = blocks[:, 4:]
    return Scales(halves(blocks, 0))


def _q8_k(blocks: Bytes, codes: Bytes) -> Scales:
    codes[:] = blocks[:, 4:260]
    return Scales(field(blocks, 0, 4, "<f4"))


def _q4_0(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 2, 18), 4, 16)
    _lower(codes, 8)
    return Scales(halves(blocks, 0))


def _q4_1(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 4, 20), 4, 16)
    return Scales(halves(blocks, 0), offsets=halves(blocks, 2))


def _fifth_bits(codes: Bytes, packed: Bytes) -> None:
    """Put bit i of 32 upon code i."""
    import numpy as np

    more = np.unpackbits(packed, axis=1, bitorder="little")
    np.left_shift(more, np.uint8(4), out=more)
    np.bitwise_or(codes, more, out=codes)


def _q5_0(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 6, 22), 4, 16)
    _fifth_bits(codes, blocks[:, 2:6])
    _lower(codes, 16)
    return Scales(halves(blocks, 0))


def _q5_1(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 8, 24), 4, 16)
    _fifth_bits(codes, blocks[:, 4:8])
    return Scales(halves(blocks, 0), offsets=halves(blocks, 2))


def _q1_0(blocks: Bytes, codes: Bytes) -> Scales:
    """1 for +d and -1 for -d."""
    import numpy as np

    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    np.left_shift(bits, np.uint8(1), out=bits)
    np.subtract(bits, np.uint8(1), out=codes)
    return Scales(halves(blocks, 0))


def _q2_0(blocks: Bytes, codes: Bytes) -> Scales:
    import numpy as np

    np.take(_four_codes(), field(blocks, 2, 18), out=codes.view(np.uint32), mode="clip")
    return Scales(halves(blocks, 0))


@cache
def _four_codes() -> NDArray[np.uint32]:
    """By a byte, its four codes of two bits, lowest first, each less 1."""
    import numpy as np

    every = np.arange(256)[:, None] >> np.array([0, 2, 4, 6]) & 3
    return np.ascontiguousarray((every - 1).astype(np.int8)).view(np.uint32).reshape(-1)


def _q2_k(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 16, 80), 2, 32)
    scales = blocks[:, :16]
    return Scales(halves(blocks, 80) * (scales & 15), halves(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Bytes, codes: Bytes) -> Scales:
    """A third bit that is 0 takes off 4."""
    import numpy as np

    spread(codes, field(blocks, 32, 96), 2, 32)
    _add_bits(codes, field(blocks, 0, 32), 1, 2)
    _lower(codes, 4)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    four = np.concatenate([low & 15, low >> 4], axis=1)
    two = np.concatenate([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], axis=1)
    scales = (four | two << 4).view(np.int8) - np.int8(32)
    return Scales(halves(blocks, 108) * scales)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and minima of 6 bits that Q4_K and Q5_K have in 12 bytes."""
    import numpy as np

    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=1)
    return scales, np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=1)


def _q4_k(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 16, 144), 4, 32)
    scales, minima = _six_bits(blocks[:, 4:16])
    return Scales(halves(blocks, 0) * scales, halves(blocks, 2) * minima)


def _q5_k(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 48, 176), 4, 32)
    _add_bits(codes, field(blocks, 16, 48), 1, 4)
    scales, minima = _six_bits(blocks[:, 4:16])
    return Scales(halves(blocks, 0) * scales, halves(blocks, 2) * minima)


def _q6_k(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 0, 128), 4, 64)
    _add_bits(codes, field(blocks, 128, 192), 2, 4)
    _lower(codes, 32)
    return Scales(halves(blocks, 208) * field(blocks, 192, 208, "i1"))


def _tq1_0(blocks: Bytes, codes: Bytes) -> Scales:
    """Five digits to the base of 3 in a byte, as a fraction of 256 that each multiplication moves on by one digit."""
    import numpy as np

    end = 0
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        width = (stop - start) * digits
        part = codes[:, end : end + width].reshape(len(codes), digits, -1)
        powers = np.array([3**i for i in range(digits)], np.uint8)
        np.multiply(blocks[:, None, start:stop], powers[:, None], out=part)
        end += width
    above = codes >= 86  # of 256, a third
    np.greater_equal(codes, 171, out=codes.view(np.bool_))
    np.add(codes, above.view(np.uint8), out=codes)
    _lower(codes, 1)
    return Scales(halves(blocks, 52))


def _tq2_0(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 0, 64), 2, 32)
    _lower(codes, 1)
    return Scales(halves(blocks, 64))


def _iq4_nl(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 2, 18), 4, 16)
    _look_up(codes, IQ4_VALUES)
    return Scales(halves(blocks, 0))


def _iq4_xs(blocks: Bytes, codes: Bytes) -> Scales:
    import numpy as np

    spread(codes, field(blocks, 8, 136), 4, 16)
    _look_up(codes, IQ4_VALUES)
    high = field(blocks, 2, 4, "<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (nibbles(blocks[:, 4:8]) | high.astype(np.uint8) << 4).view(np.int8) - np.int8(32)
    return Scales(halves(blocks, 0) * scales)


def _mxfp4(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 1, 17), 4, 16)
    _look_up(codes, _FP4)
    return Scales(_half_powers()[blocks[:, :1]])


def _nvfp4(blocks: Bytes, codes: Bytes) -> Scales:
    spread(codes, field(blocks, 4, 36), 4, 8)
    _look_up(codes, _FP4)
    return Scales(_half_e4m3()[blocks[:, :4]])


@cache
def _half_powers() -> Floats:
    """Half of what E8M0 stands for, by its byte: 2^-128 for 0, and no NaN."""
    import numpy as np

    codes = np.arange(256, dtype=np.uint32)
    return np.where(codes < 2, np.uint32(0x00200000) << codes, (codes - 1) << np.uint32(23)).view(np.float32)


@cache
def _half_e4m3() -> Floats:
    """Half of what E4M3 without a sign stands for, by its byte: 0 for the NaN 0x7F; the highest bit says nothing."""
    import numpy as np

    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, codes & 7
    found = np.where(exponents == 0, fractions * 2.0**-9, (8 + fractions) * 2.0 ** (exponents - 10))
    return np.where(codes == 0x7F, 0, found / 2).astype(np.float32)


UNPACK: dict[DType, Unpack] = {
    DType.Q8_0: _q8_0,
    DType.Q8_1: _q8_1,
    DType.Q8_K: _q8_k,
    DType.Q4_0: _q4_0,
    DType.Q4_1: _q4_1,
    DType.Q5_0: _q5_0,
    DType.Q5_1: _q5_1,
    DType.Q1_0: _q1_0,
    DType.Q2_0: _q2_0,
    DType.Q2_K: _q2_k,
    DType.Q3_K: _q3_k,
    DType.Q4_K: _q4_k,
    DType.Q5_K: _q5_k,
    DType.Q6_K: _q6_k,
    DType.TQ1_0: _tq1_0,
    DType.TQ2_0: _tq2_0,
    DType.IQ4_NL: _iq4_nl,
    DType.IQ4_XS: _iq4_xs,
    DType.MXFP4: _mxfp4,
    DType.NVFP4: _nvfp4,
}
EVEN = frozenset(UNPACK) - {DType.IQ4_NL, DType.IQ4_XS, DType.MXFP4, DType.NVFP4}
"""Types whose values lie at equal distances in each group."""
