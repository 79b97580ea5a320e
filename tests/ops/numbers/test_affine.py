"""Codes with scales: the arithmetic against numpy's float32 on the whole, whatever the blocks, groups and ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import evaluate, given_tensor, to_bytes

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.numbers import affine
from weightops.ops.numbers.affine import DTYPES, Affine, ScalesOverOne
from weightops.spec import DType

TORCH = {DType.F16: torch.float16, DType.BF16: torch.bfloat16, DType.F32: torch.float32}


def lazy(values: torch.Tensor) -> LazyTensor:
    return given_tensor(values)


def expanded(grid: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    rows, columns = shape[-2:]
    wide = grid.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., :rows, :columns]


@settings(deadline=None)
@given(st.data())
def test_any_range_is_that_of_the_whole(data: st.DataObject) -> None:
    batch = data.draw(st.sampled_from([(), (2,)]))
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    block = data.draw(st.sampled_from([(1, 8), (1, 16), (1, columns), (4, 8), (3, 16), (rows, columns)]))
    dtype = data.draw(st.sampled_from(DTYPES))
    kind = data.draw(st.sampled_from([torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]))
    torch.manual_seed(rows * columns)
    codes = torch.randint(-100, 100, (*batch, rows, columns)).to(kind)
    grid = (*batch, -(-rows // block[0]), -(-columns // block[1]))
    scales = torch.rand(grid).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    role = data.draw(st.sampled_from(["", "zeros", "biases", "shifts"]))
    extra = torch.randint(0, 9, grid, dtype=torch.uint8) if role == "zeros" else torch.randn(grid)
    roles: Any = (role,) if role else ()
    op = Affine("w", dtype, block, roles, offset=3)
    found = LazyTensor.make(op, lazy(codes), lazy(scales), *([lazy(extra)] if role else []))
    values = codes.float() - 3
    wide = expanded(extra, block, codes.shape)
    if role == "zeros":
        values = values - wide
    values = values * expanded(scales, block, codes.shape)
    if role in ("biases", "shifts"):
        values = values + wide if role == "biases" else values - wide
    expected = to_bytes(values.to(TORCH[dtype]))
    piece = data.draw(st.sampled_from([16, 1 << 17]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "_PIECE", piece)
        assert evaluate(found, data.draw(st.integers(1, 300))) == expected


def test_groups_by_index_and_products_rounded_on_the_way() -> None:
    codes = torch.arange(24, dtype=torch.uint8).reshape(2, 12)
    scales, biases = torch.rand(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    index = torch.tensor([2, 0, 1, 1, 2, 0, 0, 1, 2, 0, 1, 2], dtype=torch.int32)
    op = Affine("w", DType.BF16, (1, 4), ("biases", "g_idx"), rounded=DType.BF16)
    found = LazyTensor.make(op, lazy(codes), lazy(scales), lazy(biases), lazy(index))
    product = (codes.float() * scales.float()[:, index.long()]).bfloat16()
    assert evaluate(found, 5) == to_bytes((product.float() + biases.float()[:, index.long()]).bfloat16())


def test_small_floats_and_how_far_the_next_is() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    scales = torch.full((1, 1), 2.0)
    found = LazyTensor.make(Affine("w", DType.F32, (1, 16), table="e2m1"), lazy(codes), lazy(scales))
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    assert np.array_equal(found.numpy()[0], 2 * np.concatenate([magnitudes, -magnitudes]))
    assert np.signbit(found.numpy()[0, 8])
    steps = LazyTensor.make(Affine("w", DType.F32, (1, 16), table="e2m1", steps=True), lazy(codes), lazy(scales))
    assert np.allclose(steps.numpy()[0, :8], 2 * np.array([0.5, 0.5, 0.5, 0.5, 1, 1, 2, 2]) * (1 + 2.0**-4))


def test_steps_of_float8_are_those_to_the_next() -> None:
    every = torch.arange(0, 0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn)  # positive numbers, in order
    codes = lazy(every[:-1].reshape(1, -1).contiguous())
    op = Affine("w", DType.F32, (1, codes.spec.shape[1]), steps=True)
    found = LazyTensor.make(op, codes, lazy(torch.tensor([[2.0]])))
    assert np.allclose(found.numpy()[0], 2 * (1 + 1 / 16) * every.float().diff().numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    codes, scales = torch.zeros(2, 4, dtype=torch.int8), torch.tensor([[1.0], [value]])
    found = LazyTensor.make(Affine("layer.weight", DType.F32, (1, 4)), lazy(codes), lazy(scales))
    with pytest.raises(CorruptInput, match=r"layer\.weight: scale 1 is .*, expected a finite number that is not neg"):
        found.read()
    if value == -1.0:
        signed = LazyTensor.make(Affine("w", DType.F32, (1, 4), is_signed=True), lazy(codes), lazy(scales))
        assert not signed.numpy().any()


def test_what_does_not_fit_is_refused() -> None:
    codes = lazy(torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(IncompatibleInputs, match=r"the scales are .* for codes"):
        LazyTensor.make(Affine("w", DType.F32, (1, 4)), codes, lazy(torch.ones(2, 2)))
    index = lazy(torch.tensor([0, 1, 0, 7], dtype=torch.int32))
    found = LazyTensor.make(Affine("w", DType.F32, (1, 2), ("g_idx",)), codes, lazy(torch.ones(2, 2)), index)
    with pytest.raises(CorruptInput, match="g_idx names group 7, expected 0 to 1"):
        found.read()


def test_a_scale_of_scales_divides_or_multiplies_and_is_a_number() -> None:
    scales, one = torch.tensor([1.0, 3.0]).to(torch.float8_e4m3fn), torch.tensor([7.0])
    over = LazyTensor.make(ScalesOverOne("w"), lazy(scales), lazy(one))
    assert torch.equal(over.torch(), scales.float() / 7)
    times = LazyTensor.make(ScalesOverOne("w", is_factor=True), lazy(scales), lazy(one))
    assert torch.equal(times.torch(), scales.float() * 7)
    for bad in (0.0, float("nan"), -1.0):
        with pytest.raises(CorruptInput, match="its scale of scales is"):
            LazyTensor.make(ScalesOverOne("w"), lazy(scales), lazy(torch.tensor([bad]))).read()
