"""CRC-64/NVME against its published check value, and against the plain way to compute it."""

from __future__ import annotations

import random

import pytest

from weightops.io.crc64 import Crc64


def plainly(data: bytes) -> bytes:
    """Bit by bit."""
    state = 0xFFFFFFFFFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x9A6C9329AC4BC9B5 if state & 1 else 0)
    return (state ^ 0xFFFFFFFFFFFFFFFF).to_bytes(8, "big")


def checksum(*pieces: bytes) -> bytes:
    state = Crc64()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def test_the_check_value() -> None:
    assert checksum(b"123456789").hex() == "ae8b14860a799888"
    assert checksum() == checksum(b"") == bytes(8)


@pytest.mark.parametrize("nbytes", [1, 7, 8, 255, 4097])
def test_any_length(nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    assert checksum(data) == plainly(data)


def test_pieces_make_no_difference() -> None:
    data = random.Random(0).randbytes((2 << 20) + 5)
    whole = checksum(data)
    assert checksum(data[: 1 << 20], data[1 << 20 :]) == whole
    assert checksum(data[:3], data[3:1_500_000], data[1_500_000:]) == whole
