"""Packing against its definition: the values of a column are one long number, least significant bits first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.errors import IncompatibleInputs, UsageError
from weightops.ops.numbers.bitpack import BITS, pack, pack_columns, unpack, unpack_columns


def by_definition(values: np.ndarray, bits: int) -> np.ndarray:
    columns = []
    for column in values.T:
        number = sum(int(value) << bits * i for i, value in enumerate(column))
        words = len(column) * bits // 32
        columns.append(np.frombuffer(number.to_bytes(words * 4, "little"), np.int32))
    return np.stack(columns, axis=1)


def random_values(bits: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_words_are_what_the_definition_says_and_come_back(bits: int, blocks: int, columns: int, seed: int) -> None:
    values = random_values(bits, 32 * blocks, columns, seed)
    words = pack(values, bits)
    assert words.dtype == np.int32
    assert np.array_equal(words, by_definition(values, bits))
    assert np.array_equal(unpack(words, bits), values)
    across = pack_columns(np.ascontiguousarray(values.T), bits)
    assert np.array_equal(across, words.T)
    assert np.array_equal(unpack_columns(across, bits), values.T)


@pytest.mark.parametrize("bits", BITS)
def test_pieces_and_strides_do_not_matter(bits: int) -> None:
    values = random_values(bits, 320, 6000)
    words = pack(values, bits)
    assert np.array_equal(words[:, 100:110], by_definition(values[:, 100:110], bits))
    assert np.array_equal(unpack(words[:, ::2], bits), values[:, ::2])
    assert np.array_equal(pack(np.asfortranarray(values), bits), words)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(IncompatibleInputs, match="cannot pack 8 into 3 bits"):
        pack(np.full((32, 2), 8, np.uint8), 3)
    with pytest.raises(IncompatibleInputs, match="cannot pack 31 values of 3 bits: expected a multiple of 32"):
        pack(np.zeros((31, 2), np.uint8), 3)
    with pytest.raises(IncompatibleInputs, match="4 words are no whole number of values of 3 bits"):
        unpack(np.zeros((4, 2), np.int32), 3)
    with pytest.raises(UsageError, match="integers of 5 bits are not packed"):
        pack(np.zeros((32, 2), np.uint8), 5)
