"""CRC-64/NVME, the checksum that Amazon's S3 keeps of every object, by numpy: many stripes of a block side by side.

Source: NVM Express, "NVM Command Set Specification" 1.0, section 5.2.1.3.4; the polynomial is 0xAD93D23594C93659, here
with its bits reversed, as are those of bytes. Check value: 0xAE8B14860A799888 for the digits 1 to 9.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt

_POLYNOMIAL = 0x9A6C9329AC4BC9B5
_ONES = 0xFFFFFFFFFFFFFFFF
_STRIPES = 4096
_STEP_NBYTES = 256
"""Of a stripe: much more would not stay in the processor's cache, of less the stripes are put together too often."""
_BLOCK_NBYTES = _STRIPES * _STEP_NBYTES

Words = npt.NDArray[np.uint64]


class Crc64:
    """A running checksum of bytes."""

    def __init__(self) -> None:
        self._state = _ONES

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK_NBYTES):
            block = view[start : start + _BLOCK_NBYTES]
            count = len(block)
            if count < _BLOCK_NBYTES:  # zeros before the first byte change no remainder that begins at zero
                block = memoryview(bytes(_BLOCK_NBYTES - count) + block)
            words = np.frombuffer(block, "<u8").reshape(_STRIPES, _STEP_NBYTES // 8)
            before = _shifted(np.array([self._state], np.uint64), count)[0]
            self._state = int(before ^ _put_together(_stripes(words)))

    def digest(self) -> bytes:
        """The checksum, most significant byte first."""
        return (self._state ^ _ONES).to_bytes(8, "big")


def _stripes(block: Words) -> Words:
    """The remainder of each row, beginning at zero: 8 bytes at a time, two of which are one lookup."""
    tables = _wide_tables()
    state = np.zeros(len(block), np.uint64)
    for column in np.ascontiguousarray(block.T):
        parts = (state ^ column).view(np.uint16).reshape(-1, 4)
        state = tables[0][parts[:, 0]]
        for i in range(1, 4):
            state ^= tables[i][parts[:, i]]
    return state


def _put_together(stripes: Words) -> np.uint64:
    """The remainder of all rows one after the other."""
    nbytes = _STEP_NBYTES
    while len(stripes) > 1:
        stripes = _shifted(stripes[::2], nbytes) ^ stripes[1::2]
        nbytes *= 2
    return np.uint64(stripes[0])


def _shifted(states: Words, nbytes: int) -> Words:
    """What remainders are after as many bytes of zero."""
    tables = _shift_tables(nbytes)
    parts = np.ascontiguousarray(states).view(np.uint8).reshape(-1, 8)
    found: Words = tables[0][parts[:, 0]]
    for i in range(1, 8):
        found ^= tables[i][parts[:, i]]
    return found


@cache
def _tables(count: int) -> Words:
    """Row i: the remainder of a byte that i bytes of zero follow."""
    first = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        first = np.where(first & 1, (first >> np.uint64(1)) ^ np.uint64(_POLYNOMIAL), first >> np.uint64(1))
    rows = [first]
    for _ in range(count - 1):
        rows.append(first[(rows[-1] & np.uint64(0xFF)).astype(np.intp)] ^ (rows[-1] >> np.uint64(8)))
    return np.stack(rows)


@cache
def _wide_tables() -> Words:
    """Row i: the remainder of the two bytes at 2i in a word of eight."""
    narrow = _tables(8)
    low, high = np.arange(65536) & 0xFF, np.arange(65536) >> 8
    return np.stack([narrow[7 - 2 * i][low] ^ narrow[6 - 2 * i][high] for i in range(4)])


@lru_cache(256)
def _shift_tables(nbytes: int) -> Words:
    """Row i: what byte i of a remainder contributes to that after `nbytes` bytes of zero, which is a linear map."""
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    if nbytes == 1:
        table = _tables(1)[0]
        images = table[(bits & np.uint64(0xFF)).astype(np.intp)] ^ (bits >> np.uint64(8))
    else:
        half = nbytes // 2
        images = _shifted(_shifted(bits, half), nbytes - half)
    rows = np.zeros((8, 256), np.uint64)
    values = np.arange(256)
    for i in range(64):
        rows[i // 8] ^= np.where(values >> (i % 8) & 1, images[i], np.uint64(0)).astype(np.uint64)
    return rows
