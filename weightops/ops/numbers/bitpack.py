"""Integers of 2, 3, 4 or 8 bits in words of 32, as GPTQ checkpoints hold them: a stream of bits, the lowest first.

Value `i` of a column is at bits `bits * i` and following of the stream that its words make. So a word holds 16, 8 or 4
values of 2, 4 or 8 bits; 32 values of 3 bits take three words, and two of them lie across a boundary.
Source: `TorchLinear.pack_original` of GPTQModel 7.7, which packs 2, 3, 4 and 8 bits in this way.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.int32]
    Codes = NDArray[np.uint8]

BITS = (2, 3, 4, 8)
_WORD = 32
_PIECE = 1 << 15
"""Words that are worked on at once: few enough to stay in a core's cache during all passes."""


def period(bits: int) -> tuple[int, int]:
    """The values that begin and end with a word, and how many words they take; raises `UsageError`."""
    if bits not in BITS:
        raise UsageError(f"integers of {bits} bits are not packed", hint=f"choose one of {', '.join(map(str, BITS))}")
    together = math.lcm(bits, _WORD)
    return together // bits, together // _WORD


def pack(values: NDArray[Any], bits: int) -> Words:
    """`values` uint8 `[K, N]` as int32 words `[K * bits / 32, N]`, packed along the first axis.

    Raises `IncompatibleInputs` for values of more bits, and for K that does not fill whole words.
    """
    import numpy as np

    count, words = period(bits)
    rows, columns = values.shape
    if rows % count:
        raise IncompatibleInputs(f"cannot pack {rows} values of {bits} bits: expected a multiple of {count}")
    if values.size and int(values.max()) >> bits:
        raise IncompatibleInputs(f"cannot pack {int(values.max())} into {bits} bits")
    out = np.zeros((rows // count, words, columns), np.uint32)
    source = values.reshape(rows // count, count, columns)
    step = max(1, _PIECE // max(1, words * columns))
    for top in range(0, len(out), step):
        _pack_piece(source[top : top + step], out[top : top + step], bits)
    return out.reshape(-1, columns).view(np.int32)


def unpack(words: NDArray[Any], bits: int) -> Codes:
    """The inverse of `pack`: uint8 `[K, N]` from int32 `[K * bits / 32, N]`."""
    import numpy as np

    count, height = period(bits)
    rows, columns = words.shape
    if rows % height:
        raise IncompatibleInputs(f"{rows} words are no whole number of values of {bits} bits")
    source = np.ascontiguousarray(words).view(np.uint32).reshape(rows // height, height, columns)
    out = np.empty((rows // height, count, columns), np.uint8)
    step = max(1, _PIECE // max(1, height * columns))
    for top in range(0, len(out), step):
        _unpack_piece(source[top : top + step], out[top : top + step], bits)
    return out.reshape(-1, columns)


def pack_columns(values: NDArray[Any], bits: int) -> Words:
    """`values` uint8 `[G, N]` as int32 words `[G, N * bits / 32]`, packed along the second axis as zero points are."""
    import numpy as np

    return np.ascontiguousarray(pack(np.ascontiguousarray(values.T), bits).T)


def unpack_columns(words: NDArray[Any], bits: int) -> Codes:
    """The inverse of `pack_columns`; also for rows that are streams of any other kind."""
    import numpy as np

    count, width = period(bits)
    rows, columns = words.shape
    if columns % width:
        raise IncompatibleInputs(f"{columns} words are no whole number of values of {bits} bits")
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(rows, columns * 4)
    if bits == 8:
        return stream
    if bits == 3:
        # Three bytes are two numbers of 12 bits, and each of those is four values.
        first, second, third = (stream[:, i::3] for i in range(3))
        indices = np.empty((rows, columns * 4 // 3, 2), np.uint16)
        np.left_shift(second & 15, 8, out=indices[..., 0], dtype=np.uint16)
        indices[..., 0] |= first
        np.left_shift(third, 4, out=indices[..., 1], dtype=np.uint16)
        indices[..., 1] |= second >> 4
    else:
        indices = stream
    codes: Codes = np.take(_table(bits), indices).view(np.uint8)
    return codes.reshape(rows, columns // width * count)


@cache
def _table(bits: int) -> NDArray[Any]:
    """The values in every byte, or for 3 bits in every 12 bits, as the bytes of one number."""
    import numpy as np

    width = 12 if bits == 3 else 8
    codes = np.arange(1 << width)[:, None] >> np.arange(0, width, bits) & (1 << bits) - 1
    count = width // bits
    return codes.astype(np.uint8).view(f"u{count}").reshape(-1)


def _pack_piece(values: NDArray[Any], out: NDArray[np.uint32], bits: int) -> None:
    """Or `[B, values, N]` into the words `[B, words, N]`, which are 0."""
    import numpy as np

    if bits != 3:
        # Neighbours in twos, fours and eights, in types no wider than they need: vector units take more at once. NumPy
        # multiplies with them, but shifts bytes one by one, and mixes types through a buffer.
        width = bits
        while width < _WORD:
            dtype = np.dtype(f"u{max(1, width // 4)}")
            even, odd = values[:, 0::2], values[:, 1::2]
            joined = out if 2 * width == _WORD else np.empty(odd.shape, dtype)
            joined[:] = odd
            joined *= dtype.type(1 << width)
            joined |= even.astype(dtype, copy=False)
            values, width = joined, 2 * width
        return
    for i in range(values.shape[1]):
        word, shift = divmod(i * bits, _WORD)
        wide = values[:, i].astype(np.uint32)
        out[:, word] |= wide << np.uint32(shift)
        if shift + bits > _WORD:
            out[:, word + 1] |= wide >> np.uint32(_WORD - shift)


def _unpack_piece(words: NDArray[np.uint32], out: Codes, bits: int) -> None:
    """Take `[B, values, N]` out of the words `[B, words, N]`."""
    import numpy as np

    mask = np.uint32((1 << bits) - 1)
    for i in range(out.shape[1]):
        word, shift = divmod(i * bits, _WORD)
        found = words[:, word] >> np.uint32(shift)
        if shift + bits > _WORD:
            found |= words[:, word + 1] << np.uint32(_WORD - shift)
        found &= mask
        out[:, i] = found
