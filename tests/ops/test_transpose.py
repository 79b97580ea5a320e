"""Rows and columns exchanged: as torch does it, in any part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TORCH_DTYPES, evaluate, given_tensor, random_tensor, to_bytes

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops import transpose
from weightops.ops.transpose import Transpose, transposed
from weightops.spec import DType


@given(st.sampled_from(TORCH_DTYPES), st.integers(0, 9), st.integers(0, 9), st.integers(1, 400), st.integers(1, 80))
def test_it_is_that_of_torch(dtype: DType, rows: int, columns: int, block: int, read_nbytes: int) -> None:
    matrix = random_tensor(dtype, (rows, columns), seed=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transpose, "_READ_NBYTES", read_nbytes)
        found = transposed(given_tensor(matrix, dtype))
        assert found.spec.shape == (columns, rows)
        assert evaluate(found, block) == to_bytes(matrix.t())


def test_twice_is_not_at_all() -> None:
    tensor = given_tensor(random_tensor(DType.F32, (3, 5), 0))
    assert transposed(transposed(tensor)) is tensor


def test_it_goes_to_json_and_back() -> None:
    tensor = transposed(given_tensor(random_tensor(DType.F16, (3, 5), 0)))
    assert LazyTensor.from_json(tensor.to_json()) == tensor


@pytest.mark.parametrize("shape", [(), (3,)])
def test_only_matrices_have_rows_and_columns(shape: tuple[int, ...]) -> None:
    with pytest.raises(IncompatibleInputs, match="no rows and columns"):
        LazyTensor.make(Transpose(), given_tensor(random_tensor(DType.F32, shape, 0)))
