"""Codes out of words: every packing against the plainest way to say it, and any range against the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import evaluate

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.numbers.codes import AWQ, Codes, FastCodes, Order, RowCodes
from weightops.ops.rows import Given
from weightops.spec import DType


def words(rows: list[list[int]], dtype: DType) -> LazyTensor:
    data = np.array(rows, np.uint64).astype(f"<u{dtype.itemsize}")
    return LazyTensor.make(Given(dtype, data.shape, data.tobytes()))


def packed(codes: np.ndarray, bits: int, order: Order) -> LazyTensor:
    """Rows of words of 32 bits, as numbers of any length are shifted together."""
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        if order == "padded":
            groups = [row[i : i + per_word] for i in range(0, len(row), per_word)]
            rows.append([sum(code << bits * i for i, code in enumerate(group)) for group in groups])
            continue
        if order == "high":
            row = [row[i ^ 1] if (i ^ 1) < len(row) else 0 for i in range(len(row) + len(row) % 2)]
        stream = sum(code << bits * i for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([stream >> 32 * i & 0xFFFFFFFF for i in range(count)])
    return words(rows, DType.I32)


@given(st.sampled_from([2, 3, 4, 5, 6, 7, 8]), st.integers(1, 5), st.integers(1, 80), st.integers(1, 97), st.data())
def test_rows_are_those_that_were_packed_in_any_range(
    bits: int, rows: int, columns: int, block: int, data: st.DataObject
) -> None:
    orders: list[Order] = ["low", "padded", "high"] if bits == 4 else ["low", "padded"]
    order = data.draw(st.sampled_from(orders))
    codes = np.random.default_rng(rows * columns).integers(0, 1 << bits, (rows, columns))
    found = LazyTensor.make(Codes(bits, columns, order), packed(codes, bits, order))
    assert evaluate(found, block) == codes.astype(np.uint8).tobytes()


@given(st.booleans(), st.integers(1, 6), st.integers(1, 40), st.integers(1, 97))
def test_rows_of_words_are_rows_of_codes(planes: bool, height: int, columns: int, block: int) -> None:
    values = np.random.default_rng(height).integers(0, 1 << 32, (height, columns), dtype=np.uint64)
    found = LazyTensor.make(RowCodes(4, AWQ, planes), words(values.tolist(), DType.I32))
    parts = np.stack([values >> shift & 15 for shift in AWQ], axis=0 if planes else 1)
    assert evaluate(found, block) == parts.reshape(-1, columns).astype(np.uint8).tobytes()


def test_gemv_fast_is_what_autoawq_packs() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (8, 128))
    # `pack_intweight` of autoawq 0.2.9, with four rows and 64 columns at a time
    kernel = codes.reshape(8, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(8, 4, 4, 4, 2).transpose(0, 1, 2, 4, 3)
    kernel = kernel.reshape(2, 4, 2, 64).transpose(0, 2, 1, 3).reshape(2, 2, 64, 4)
    stored = sum(kernel[..., i] << 4 * i for i in range(4)).reshape(2, 128)
    found = LazyTensor.make(FastCodes(), words(stored.tolist(), DType.I16))
    assert evaluate(found, 100) == codes.astype(np.uint8).tobytes()


def test_rows_that_are_too_short_are_refused() -> None:
    with pytest.raises(IncompatibleInputs, match="holds no rows of 9 codes of 4 bits"):
        LazyTensor.make(Codes(4, 9), words([[0]], DType.I32))
