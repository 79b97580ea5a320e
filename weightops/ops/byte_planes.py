"""The code of a compressed delta's blocks: byte planes and zstd, as pure functions of bytes.

A block is the next 1 MiB of a tensor's bytes. What differs little from its base differs in the low bytes of each
element, so bytes of one place are put together (all first bytes, then all second ones, and so on: planes), and zstd
finds what there is to save. How long the coded block is says what it is: nothing is zeros, as long as what it holds is
the bytes as they are, and anything between is one zstd frame.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightops.io.memory import copy_bytes

if TYPE_CHECKING:
    import numpy as np
    import zstandard
    from numpy.typing import NDArray

_OWN = threading.local()
BLOCK_NBYTES = 1 << 20
"""Of a tensor's bytes, a whole number of elements of each type: longer blocks are no smaller, shorter ones are."""
_LEVEL = 1
"""Of zstd: above it differences get hardly smaller, and take several times as long."""


def count_blocks(nbytes: int) -> int:
    """In how many blocks so many bytes are put down."""
    return -(-nbytes // BLOCK_NBYTES)


def encode(block: memoryview, itemsize: int) -> bytes | memoryview:
    """A block of whole elements of `itemsize` bytes, coded: never more bytes than it has."""
    import numpy as np
    import zstandard

    values = np.frombuffer(block, np.uint8)
    if not values.any():
        return b""
    planes = np.ascontiguousarray(values.reshape(-1, itemsize).T)
    coded = zstandard.ZstdCompressor(level=_LEVEL).compress(planes.data.cast("B"))
    return coded if len(coded) < len(block) else block


def decode(coded: memoryview, out: memoryview, itemsize: int) -> None:
    """Fill `out` with the block that was coded.

    Raises `ValueError` for what gives another number of bytes: what a frame says of its size is looked at before
    anything is decompressed, and no more than that comes of it.
    """
    import numpy as np
    import zstandard

    values = np.frombuffer(out, np.uint8)
    if not coded:
        values.fill(0)
        return
    if len(coded) == len(out):
        copy_bytes(out, coded)
        return
    try:
        says = zstandard.get_frame_parameters(coded).content_size
        if says != len(out):
            raise ValueError(f"its zstd frame says that it holds {says} bytes, expected {len(out)}")
        decompressor, memory = _own()
        planes = memory[: len(out)]
        with decompressor.stream_reader(coded, read_across_frames=True) as reader:
            found = reader.readinto(planes)
            if found < len(out):
                raise ValueError(f"its zstd frame ends after {found} of {len(out)} bytes")
            if reader.read(1):
                raise ValueError(f"more than one zstd frame, expected {len(out)} bytes in one")
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd says {error}") from None
    _interleave(np.frombuffer(planes, np.uint8).reshape(itemsize, -1), values)


def _own() -> tuple[zstandard.ZstdDecompressor, memoryview]:
    """A decompressor and memory for planes, once a thread: the pages of new memory cost as much as what fills them."""
    import zstandard

    if not hasattr(_OWN, "both"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=BLOCK_NBYTES)
        _OWN.both = decompressor, memoryview(bytearray(BLOCK_NBYTES))
    both: tuple[zstandard.ZstdDecompressor, memoryview] = _OWN.both
    return both


def _interleave(planes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Put the bytes of each element together again."""
    import numpy as np

    itemsize = len(planes)
    if itemsize == 2:  # by words, in half the time
        words = out.view("<u2")
        np.left_shift(planes[1], 8, out=words, dtype=np.uint16)
        np.bitwise_or(words, planes[0], out=words)
        return
    elements = out.reshape(-1, itemsize)
    for i in range(itemsize):  # one strided copy for each: a transposed one takes five times as long
        elements[:, i] = planes[i]


def pack_lengths(lengths: Sequence[int]) -> bytes:
    """Lengths of blocks as files hold them: unsigned 32-bit little-endian integers."""
    return struct.pack(f"<{len(lengths)}I", *lengths)


def unpack_lengths(data: bytes) -> tuple[int, ...]:
    """The lengths that `pack_lengths` put down."""
    return struct.unpack(f"<{len(data) // 4}I", data)
