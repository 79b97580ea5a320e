"""What scaled and packed numbers stand for, against the libraries that define them; and how far apart values are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import evaluate, given_tensor

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.numbers.stored_scales import GroupSteps, Scaled


def numbers(tensor: LazyTensor, block: int | None = None) -> np.ndarray:
    return np.frombuffer(evaluate(tensor, block), np.float32).reshape(tensor.spec.shape)


@pytest.mark.parametrize("shape", [(1,), (), (300,), (300, 1), (3, 2)])
def test_scaled_floats_are_products(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    values = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(shape) + 0.5
    wide = scales.reshape(300, 1) if 300 in shape else scales
    if shape == (3, 2):
        wide = scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    inputs = given_tensor(values), given_tensor(scales)
    for block in (None, 5000):
        assert np.array_equal(numbers(LazyTensor.make(Scaled(), *inputs), block), (values.float() * wide).numpy())


def test_steps_of_small_floats_are_those_to_the_next() -> None:
    every = torch.arange(0, 0x7E, dtype=torch.uint8)  # positive numbers, in order
    values = every.view(torch.float8_e4m3fn)
    gaps = values.float().diff().repeat(1)
    table = given_tensor(values[:-1].reshape(1, -1).contiguous())
    steps = numbers(LazyTensor.make(Scaled(steps=True), table, given_tensor(torch.tensor([2.0]))))
    assert np.allclose(steps[0], 2 * (1 + 1 / 16) * gaps.numpy())


def test_group_steps_follow_the_index() -> None:
    scales = torch.tensor([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]]).half()
    plain = numbers(LazyTensor.make(GroupSteps(4, 2), given_tensor(scales)))
    assert plain.tolist() == [[0.5, 0.5, 4, 4], [1, 1, 8, 8], [2, 2, 16, 16]]
    index = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    ordered = numbers(LazyTensor.make(GroupSteps(4, 2), given_tensor(scales), given_tensor(index)), 16)
    assert ordered.tolist() == [[4, 0.5, 4, 0.5], [8, 1, 8, 1], [16, 2, 16, 2]]


def test_what_does_not_fit_is_refused() -> None:
    values = given_tensor(torch.zeros(4, 4).to(torch.float8_e4m3fn))
    with pytest.raises(IncompatibleInputs, match="do not fit"):
        LazyTensor.make(Scaled(), values, given_tensor(torch.ones(3)))
    with pytest.raises(IncompatibleInputs, match="cannot scale"):
        LazyTensor.make(Scaled(), given_tensor(torch.ones(4, 4)), given_tensor(torch.ones(1)))
