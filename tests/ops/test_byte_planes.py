"""Coded blocks: what comes back is what went in, and nothing else does."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from weightops.ops.byte_planes import BLOCK_NBYTES, decode, encode, pack_lengths, unpack_lengths

ITEMSIZES = (1, 2, 4, 8)


def decoded(coded: bytes | memoryview, nbytes: int, itemsize: int) -> bytes:
    out = bytearray(b"\xaa" * nbytes)
    decode(memoryview(coded), memoryview(out), itemsize)
    return bytes(out)


@given(st.sampled_from(ITEMSIZES), st.integers(0, 300), st.integers(0, 255), st.integers(0, 2**32))
def test_any_block_comes_back_and_takes_no_more_than_it_has(itemsize: int, count: int, mask: int, seed: int) -> None:
    block = (np.random.default_rng(seed).integers(0, 256, count * itemsize, np.uint8) & mask).tobytes()
    coded = encode(memoryview(block), itemsize)
    assert len(coded) <= len(block)
    assert decoded(coded, len(block), itemsize) == block


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_a_whole_block_of_small_differences_is_smaller(itemsize: int) -> None:
    values = np.zeros((BLOCK_NBYTES // itemsize, itemsize), np.uint8)
    values[:, 0] = np.random.default_rng(0).integers(0, 16, len(values))
    coded = encode(memoryview(values.tobytes()), itemsize)
    assert len(coded) < 0.6 * BLOCK_NBYTES / itemsize
    assert decoded(coded, BLOCK_NBYTES, itemsize) == values.tobytes()


def test_what_a_coded_block_is_its_length_says() -> None:
    noise = np.random.default_rng(0).bytes(4096)
    assert encode(memoryview(bytes(4096)), 2) == b""
    assert bytes(encode(memoryview(noise), 2)) == noise
    assert decoded(b"", 6, 2) == bytes(6)
    assert decoded(b"abcdef", 6, 2) == b"abcdef"


def test_planes_are_all_first_bytes_then_all_second_ones() -> None:
    block = bytes(range(8)) * 1024
    planes = zstandard.ZstdDecompressor().decompress(bytes(encode(memoryview(block), 4)))
    assert planes == b"".join(block[i::4] for i in range(4))


def frame(data: bytes, **options: object) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, **options)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


NBYTES = 1 << 16
GOOD = frame(bytes(NBYTES - 1) + b"x")


@pytest.mark.parametrize(
    ("coded", "words"),
    [
        (b"x", "zstd says"),
        (b"\xff" * 64, "zstd says"),
        (GOOD[:-3], f"ends after 0 of {NBYTES} bytes"),
        (GOOD + b"\x00", "zstd says"),
        (GOOD + GOOD, "more than one"),
        (frame(bytes(NBYTES + 2)), f"says that it holds {NBYTES + 2} bytes"),
        (frame(bytes(NBYTES - 2)), f"says that it holds {NBYTES - 2} bytes"),
        (frame(bytes(1 << 28)), "says that it holds 268435456 bytes"),
        (frame(bytes(NBYTES), write_content_size=False), "says that it holds"),
        (b"\x28\xb5\x2f\xfd\xc0" + b"\x70" + b"\xff" * 8 + GOOD[9:], "says that it holds"),
        (b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", "says that it holds|zstd says"),
    ],
)
def test_a_frame_that_is_none_or_holds_something_else_is_refused(coded: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoded(coded, NBYTES, 2)


def test_a_frame_that_wants_more_memory_than_a_block_is_refused() -> None:
    """A window of 2 GiB, said in a header that promises the right size."""
    said = b"\x28\xb5\x2f\xfd\x80\xa8" + NBYTES.to_bytes(4, "little")
    assert zstandard.get_frame_parameters(said).window_size == 1 << 31
    raw_block = (1 | NBYTES - 1 << 3).to_bytes(3, "little") + bytes(NBYTES - 1)
    with pytest.raises(ValueError, match="zstd says"):
        decoded(said + raw_block, NBYTES, 2)


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_damage_is_refused_or_gives_a_block_of_that_size(noise: bytes, more: bytes) -> None:
    coded = GOOD[:6] + noise + more
    with contextlib.suppress(ValueError):
        assert len(decoded(coded, NBYTES, 2)) == NBYTES


@given(st.lists(st.integers(0, BLOCK_NBYTES), max_size=20))
def test_lengths_go_there_and_back(lengths: list[int]) -> None:
    assert unpack_lengths(pack_lengths(lengths)) == tuple(lengths)
    assert pack_lengths(lengths) == np.array(lengths, "<u4").tobytes()
