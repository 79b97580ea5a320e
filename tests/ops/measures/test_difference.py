"""Differences against torch in float64 on whole tensors, however the blocks fall."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TORCH_DTYPES, given_tensor, random_tensor, torch_dtype

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.measures.difference import Difference, TensorDifference
from weightops.ops.measures.statistics import has_statistics
from weightops.spec import DType

NUMBERS = [dtype for dtype in TORCH_DTYPES if has_statistics(dtype)]
FLOATS = [DType.F16, DType.BF16, DType.F32, DType.F64]


def measure(a: torch.Tensor, b: torch.Tensor, block_nbytes: int = 1 << 12, **how: object) -> TensorDifference:
    op = Difference("x", **how)  # type: ignore[arg-type]
    tensor = LazyTensor.make(op, given_tensor(a), given_tensor(b))
    with Evaluator() as read:
        for _ in read.drain(tensor, block_nbytes):
            pass
        assert not read.running
        return TensorDifference.from_note(read.noted([tensor])["x"])


@given(
    dtypes=st.tuples(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS)),
    shape=st.sampled_from([(), (5,), (7, 9), (64, 33), (3, 5, 4)]),
    seed=st.integers(0, 1000),
    like=st.booleans(),
    block_nbytes=st.sampled_from([1, 1000, 1 << 22]),
)
@settings(max_examples=120)
def test_counts_and_norms_are_those_of_whole_tensors(
    dtypes: tuple[DType, DType], shape: tuple[int, ...], seed: int, like: bool, block_nbytes: int
) -> None:
    """Of random bits: NaN payloads, infinities, subnormals and zeros of both signs."""
    a = random_tensor(dtypes[0], shape, seed)
    b = a.to(torch_dtype(dtypes[1])) if like else random_tensor(dtypes[1], shape, seed + 1)
    found = measure(a, b, block_nbytes)
    x, y = (t.double() for t in (a, b))
    both_integers = not a.is_floating_point() and not b.is_floating_point() and a.dtype == b.dtype
    equal = (a == b) if both_integers else (x == y) | (x.isnan() & y.isnan())
    assert found.changed == int((~equal).sum())
    assert found.flips == int(((x * y < 0) & x.isfinite() & y.isfinite()).sum()) or DType.F64 in dtypes
    counts = [int(t.sum()) for t in (x.isnan(), y.isnan(), x.isinf(), y.isinf())]
    assert [found.nan_a, found.nan_b, found.infinite_a, found.infinite_b] == counts
    finite = x.isfinite() & y.isfinite()
    d = torch.where(finite, y - x, 0.0)
    if float(d.abs().max() if d.numel() else 0) < 1e150 and float(torch.where(finite, x, 0.0).abs().sum()) < 1e150:
        assert found.norm_d == pytest.approx(float(d.norm()), rel=1e-5)
        assert found.norm_a == pytest.approx(float(torch.where(finite, x, 0.0).norm()), rel=1e-5)
        assert found.max_abs == pytest.approx(float(d.abs().max()), rel=1e-6)
    if found.max_index is not None:
        assert abs(float(d.flatten()[found.max_index])) == pytest.approx(found.max_abs, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_small_angles_do_not_cancel(dtype: DType) -> None:
    """A cosine in float64 would be 1 for all of them."""
    torch.manual_seed(0)
    a = torch.randn(64, 64).to(torch_dtype(dtype))
    b = a.clone()
    b[3, 4] += 0.25
    found = measure(a, b)
    x, y = a.double().flatten(), b.double().flatten()
    across = y - x * (x @ y) / (x @ x)
    assert found.angle == pytest.approx(float((across @ across) / (2 * (y @ y))), rel=1e-4)
    assert 0 < found.angle < 1e-5
    assert (found.max_index, found.changed, found.flips) == (3 * 64 + 4, 1, int(x[196] * y[196] < 0))


@pytest.mark.parametrize("size", [1e-25, 1e25, 1e-3])
def test_numbers_that_float32_cannot_square_are_added_up_all_the_same(size: float) -> None:
    a = torch.full((4, 8), size).bfloat16()
    b = 2 * a
    found = measure(a, b)
    assert found.norm_a == pytest.approx(float(a.double().norm()), rel=1e-6)
    assert found.relative == pytest.approx(1)
    assert found.scale == pytest.approx(2)


def test_casts_are_told_by_their_bits() -> None:
    a = torch.randn(40, 30)
    a[0, 0], a[0, 1] = math.nan, 1e30
    half = a.half()  # with an infinity
    assert measure(a, half).is_cast
    assert not measure(a, half).is_cast_of_b
    assert measure(half, a).is_cast_of_b
    wide = measure(half, half.float())
    assert (wide.is_cast, wide.is_cast_of_b, wide.changed, wide.is_same_bytes) == (True, True, 0, False)
    half[5, 5] = torch.nextafter(half[5, 5], half[5, 5] + 1)
    assert not measure(a, half).is_cast
    assert measure(half.bfloat16(), half.clone()).is_cast is False
    assert measure(a, a.clone()).is_cast is None


def test_same_bytes_and_same_numbers_are_two_things() -> None:
    a = torch.tensor([[0.0, math.nan, 1.0]])
    same, equal = measure(a, a.clone()), measure(a, torch.tensor([[-0.0, math.nan, 1.0]]))
    assert (same.is_same_bytes, same.changed) == (True, 0)
    assert (equal.is_same_bytes, equal.changed, equal.nan_a) == (False, 0, 1)
    other = measure(a, torch.tensor([[0.0, 1.0, math.nan]]))
    assert (other.changed, other.odd, other.first_odd, other.norm_d) == (2, 2, 2, 0)


def test_rows_and_heads_are_those_that_changed() -> None:
    torch.manual_seed(1)
    a = torch.randn(32, 16).half()
    b = a.clone()
    b[8:16] *= 1.5
    found = measure(a, b, heads=4)
    assert [head.number for head in found.heads if head.change] == [1]
    assert found.heads[1].scale == pytest.approx(1.5, rel=1e-3)
    assert found.heads[1].explained > 0.99
    assert (found.changed_rows, {row.number for row in found.listed_rows}) == (8, set(range(8, 16)))
    by_columns = measure(a.T.contiguous(), b.T.contiguous(), heads=4, axis="columns")
    for one, other in zip(by_columns.heads, found.heads, strict=True):
        assert one.number == other.number
        assert (one.change, one.scale) == pytest.approx((other.change, other.scale), rel=1e-6)
    assert measure(a, torch.randn(32, 16).half(), heads=4).heads[0].explained == 0  # nothing along a


def test_the_sample_has_the_rank_of_the_change() -> None:
    torch.manual_seed(2)
    a = torch.randn(300, 200)
    factors = torch.randn(300, 5) @ torch.randn(5, 200)
    assert measure(a, a + factors, sample=64).sample_rank == 5
    assert measure(a, a + torch.randn(300, 200), sample=64).sample_rank > 50
    assert measure(a, a.clone(), sample=64).sample_rank == 0


def test_steps_say_how_far_a_rounded_copy_is() -> None:
    torch.manual_seed(3)
    a, step = torch.randn(16, 64), 0.1
    rounded, steps = (a / step).round() * step, torch.full((16, 64), step)
    steps[0, 0] = 0  # a group of zeros has none
    node = LazyTensor.make(Difference("x"), given_tensor(a), given_tensor(rounded), given_tensor(steps))
    with Evaluator() as read:
        list(read.drain(node, 1 << 10))
        found = TensorDifference.from_note(read.noted([node])["x"])
    assert found.stepped == found.within_half == 16 * 64 - 1
    assert found.steps == pytest.approx(1 / math.sqrt(12), rel=0.1)


def test_notes_hold_everything() -> None:
    found = measure(torch.randn(32, 16), torch.randn(32, 16), heads=2, sample=8)
    assert TensorDifference.from_note(found.to_note()) == found
    assert found != replace_field(found)


def replace_field(found: TensorDifference) -> TensorDifference:
    import msgspec

    return msgspec.structs.replace(found, flips=found.flips + 1)


def test_empty_tensors_and_other_shapes() -> None:
    assert measure(torch.zeros(0, 4), torch.zeros(0, 4)).is_same_bytes
    with pytest.raises(IncompatibleInputs, match="cannot compare"):
        measure(torch.zeros(3), torch.zeros(4))
    assert np.isfinite(measure(torch.zeros(3), torch.zeros(3)).relative)
    assert measure(torch.zeros(3), torch.ones(3)).relative == math.inf
