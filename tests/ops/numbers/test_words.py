"""Codes into words: taken out again they are what they were, and the words those of the libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import evaluate

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.numbers.codes import AWQ, Codes, RowCodes, held
from weightops.ops.numbers.words import RowWords, Words, row_words_of, words_of
from weightops.ops.rows import Given
from weightops.spec import DType


def codes_of(bits: int, rows: int, columns: int, seed: int) -> tuple[np.ndarray, LazyTensor]:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    return codes, LazyTensor.make(Given(DType.U8, codes.shape, codes.tobytes()))


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 97), st.integers(1, 97), st.integers(0, 99))
def test_words_are_the_inverse_of_codes(bits: int, rows: int, columns: int, block: int, seed: int) -> None:
    codes, tensor = codes_of(bits, rows, columns, seed)
    words = LazyTensor.make(Words(bits), tensor)
    assert evaluate(words, block) == evaluate(words)
    assert evaluate(LazyTensor.make(Codes(bits, columns), words)) == codes.tobytes()


@given(st.integers(1, 5), st.integers(1, 33), st.integers(1, 97), st.integers(0, 99))
def test_words_over_rows_are_the_inverse_of_their_codes(rows: int, columns: int, block: int, seed: int) -> None:
    codes, tensor = codes_of(4, rows * 8, columns, seed)
    words = LazyTensor.make(RowWords(4, AWQ), tensor)
    assert evaluate(words, block) == evaluate(words)
    assert evaluate(LazyTensor.make(RowCodes(4, AWQ), words)) == codes.tobytes()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [64, 40, 33, 7])
def test_words_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is the reference for its own format")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes, tensor = codes_of(bits, 9, columns, bits)
    signed = torch.from_numpy(codes.astype(np.int16) - (1 << bits - 1)).to(torch.int8)
    assert evaluate(LazyTensor.make(Words(bits), tensor)) == pack_to_int32(signed, bits).numpy().tobytes()


def test_words_that_codes_were_taken_from_are_not_made_again() -> None:
    source = LazyTensor.make(Given(DType.I32, (8, 4), bytes(128)))
    assert words_of(LazyTensor.make(Codes(3, 40), source), 3).op == Words(3)  # a word more than its codes need
    assert words_of(LazyTensor.make(Codes(4, 32), held(source)), 4) is source
    assert row_words_of(LazyTensor.make(RowCodes(4, AWQ), held(source)), 4, AWQ) is source


def test_what_holds_no_codes_is_refused() -> None:
    wide = LazyTensor.make(Given(DType.I32, (3, 2), bytes(24)))
    with pytest.raises(IncompatibleInputs, match="no rows of codes"):
        LazyTensor.make(Words(4), wide)
    with pytest.raises(IncompatibleInputs, match="no codes in 8 rows"):
        LazyTensor.make(RowWords(4, AWQ), wide)
