"""A tensor's values as numpy and torch have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import TORCH_DTYPES, given_tensor, random_tensor, to_bytes, write_checkpoint

import weightops
from weightops.errors import UsageError
from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_torch_has_the_bits_and_numpy_the_values(dtype: DType, shape: tuple[int, ...]) -> None:
    expected = random_tensor(dtype, shape, 0)
    lazy = given_tensor(expected)
    found = lazy.torch()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert to_bytes(found) == to_bytes(expected)
    values = lazy.numpy()
    assert values.shape == shape
    if dtype is DType.BF16 or dtype.value.startswith("float8"):
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected.float().numpy())
    else:
        np.testing.assert_array_equal(values, expected.numpy())
    np.testing.assert_array_equal(np.asarray(lazy), values)


def test_asarray_casts_and_always_copies() -> None:
    lazy = given_tensor(torch.arange(4, dtype=torch.bfloat16))
    assert np.asarray(lazy, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="always a copy"):
        np.array(lazy, copy=False)
    values = lazy.numpy()
    values[0] = 7  # memory of its own
    assert lazy.numpy()[0] == 0


def test_types_of_less_than_a_byte_have_bytes_alone() -> None:
    lazy = LazyTensor.make(Given(DType.F4, (4,), b"\x12\x34"))
    assert bytes(lazy.read()) == b"\x12\x34"
    for ask in (lazy.torch, lazy.numpy):
        with pytest.raises(UsageError, match="torch has no tensors of"):
            ask()


def test_a_tensor_of_a_checkpoint_is_an_array(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.arange(6.0).reshape(2, 3)})
    np.testing.assert_array_equal(weightops.open_checkpoint(tmp_path)["a"], np.arange(6.0).reshape(2, 3))
