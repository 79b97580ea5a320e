"""Rows put together of several matrices: the right ones in any blocks, and means as torch has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import evaluate, given_tensor, random_tensor, to_bytes, torch_dtype

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.gather import ZEROS, Gather, MeanOfRows
from weightops.ops.rows import Given
from weightops.spec import DType

ROWS = (5, 1, 7)


def packed(pairs: Sequence[tuple[int, int]]) -> bytes:
    return np.array(pairs, "<i4").reshape(-1, 2).tobytes()


def matrices(dtype: DType, columns: int = 3) -> list[torch.Tensor]:
    return [random_tensor(dtype, (rows, columns), rows) for rows in ROWS]


places = st.one_of(
    st.just((ZEROS, 0)),
    st.sampled_from(range(len(ROWS))).flatmap(
        lambda source: st.tuples(st.just(source), st.integers(0, ROWS[source] - 1))
    ),
)


@settings(max_examples=30)
@given(
    st.lists(places, min_size=1, max_size=20), st.sampled_from([DType.BF16, DType.F32, DType.I8]), st.integers(1, 90)
)
def test_rows_are_those_of_the_places_in_any_blocks(pairs: list[tuple[int, int]], dtype: DType, block: int) -> None:
    inputs = matrices(dtype)
    zeros = torch.zeros(3, dtype=torch_dtype(dtype))
    expected = torch.stack([zeros if source == ZEROS else inputs[source][row] for source, row in pairs])
    found = LazyTensor.make(Gather(packed(pairs)), *(given_tensor(each, dtype) for each in inputs))
    assert evaluate(found, block) == evaluate(found) == to_bytes(expected)


def test_rows_that_follow_each_other_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:

    reads = []
    original = Given.fill
    monkeypatch.setattr(
        Given, "fill", lambda self, t, start, out, read: reads.append(len(out)) or original(self, t, start, out, read)
    )
    pairs = [(0, 1), (0, 2), (0, 3), (ZEROS, 0), (ZEROS, 0), (0, 4), (1, 0), (0, 0)]
    evaluate(LazyTensor.make(Gather(packed(pairs)), *(given_tensor(each) for each in matrices(DType.F32))))
    assert reads == [3 * 12, 12, 12, 12]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_means_are_added_up_in_order_in_their_type(dtype: DType) -> None:
    inputs = [(torch.randn(rows, 40) * 3).to(torch_dtype(dtype)) for rows in ROWS]
    chosen = [[(0, 1), (1, 0), (2, 6)], [(2, 2)], [(2, 0), (0, 0), (2, 0), (0, 4)]]
    expected = []
    for rows in chosen:
        total = torch.zeros(40, dtype=torch_dtype(dtype))
        for source, row in rows:
            total = total + inputs[source][row]
        expected.append(total / len(rows))
    counts = np.array([len(rows) for rows in chosen], "<i4").tobytes()
    op = MeanOfRows(packed([place for rows in chosen for place in rows]), counts)
    found = LazyTensor.make(op, *(given_tensor(each) for each in inputs))
    assert found.spec.shape == (3, 40)
    assert evaluate(found, 100) == evaluate(found) == to_bytes(torch.stack(expected))


def test_matrices_of_another_width_or_type_are_refused() -> None:
    wide, narrow = given_tensor(torch.zeros(2, 4)), given_tensor(torch.zeros(2, 3))
    for other in (narrow, given_tensor(torch.zeros(2, 4).half())):
        with pytest.raises(IncompatibleInputs, match=r"cannot put rows of .* into one matrix"):
            LazyTensor.make(Gather(packed([(0, 0)])), wide, other)
    with pytest.raises(IncompatibleInputs, match="no columns"):
        LazyTensor.make(Gather(packed([(0, 0)])), given_tensor(torch.zeros(2, 0)))
