"""Sums of squares and counts to what columns weigh: any range of bytes alone, and of no token the value 1."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.ggml.importance import Importance
from weightops.ops.rows import Given
from weightops.spec import DType, TensorSpec


def tensor(values: np.ndarray) -> LazyTensor:
    return LazyTensor.make(Given(DType.F32, values.shape, values.astype(np.float32).tobytes()))


@given(
    experts=st.integers(1, 4),
    columns=st.integers(1, 5),
    calls=st.integers(1, 3),
    start=st.integers(0),
    stop=st.integers(0),
)
def test_any_range_is_that_of_the_whole(experts: int, columns: int, calls: int, start: int, stop: int) -> None:
    sums = np.arange(experts * columns, dtype=np.float32).reshape(experts, columns) / 7
    counts = np.arange(experts, dtype=np.float32)[:, None]
    found = LazyTensor.make(Importance(calls), tensor(sums), tensor(counts))
    with np.errstate(all="ignore"):
        expected = np.where(counts > 0, sums / counts, 1).astype(np.float32) * np.float32(calls)
    assert found.spec.shape == ((columns,) if experts == 1 else (experts, columns))
    first, last = sorted((start % (expected.size + 1), stop % (expected.size + 1)))
    out = bytearray(4 * (last - first))
    with Evaluator() as evaluate:
        if out:
            evaluate(found, 4 * first, memoryview(out))
    assert bytes(out) == expected.ravel()[first:last].tobytes()


def test_counts_that_do_not_fit_are_refused() -> None:
    for shape in ((0, 1), (4, 1)):
        with pytest.raises(IncompatibleInputs, match="cannot divide"):
            Importance().spec(TensorSpec(DType.F32, (3, 2)), TensorSpec(DType.F32, shape))
