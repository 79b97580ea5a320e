"""What must hold of merging whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_cases import drawn
from naive_merging import merge, naively
from support import from_bytes, random_tensor, to_bytes

from weightops.errors import IncompatibleInputs, UsageError
from weightops.ops.merging import inputs
from weightops.ops.merging.methods import METHODS, find_method
from weightops.spec import DType

FLOATS = (DType.BF16, DType.F16, DType.F32, DType.F64)


@settings(max_examples=15)
@given(st.sampled_from(FLOATS), st.integers(0, 2**32), st.floats(0.1, 3), st.booleans())
def test_linear_of_one_model_is_that_model_to_the_bit(dtype: DType, seed: int, weight: float, normalize: bool) -> None:
    tensor = torch.nan_to_num(random_tensor(dtype, (11, 7), seed), 1.0, 2.0, -2.0)
    weight = weight if normalize and dtype is DType.F16 else 1.0  # of others the largest times 2 has no room in float32
    found = merge("linear", [tensor], None, {"normalize": normalize}, [{"weight": weight}])
    # zeros lose their sign, as they are added to zero
    assert to_bytes(found) == to_bytes(tensor + 0)


@settings(max_examples=15)
@given(st.permutations(range(4)), st.sampled_from(["linear", "karcher", "model_stock", "ram", "ramplus_tl", "sce"]))
def test_the_order_of_models_does_not_matter(order: list[int], method: str) -> None:
    base, *others = drawn((40, 30), torch.float64, 4)
    own = [{"weight": 0.3}, {"weight": 1.0}, {"weight": -0.2}, {"weight": 0.7}]
    places = (None, None) if method in ("linear", "karcher") else (0, 4)  # to these the base is a model like any other
    expected = merge(method, [base, *others], places[0], None, [{"weight": 0.5}, *own])
    again = [others[i] for i in order], [own[i] for i in order]
    found = merge(method, [*again[0], base], places[1], None, [*again[1], {"weight": 0.5}])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", sorted(m for m, found in METHODS.items() if found.base == "needed"))
def test_models_that_changed_nothing_give_the_base(method: str) -> None:
    (base,) = drawn((20, 30), torch.bfloat16, 0)
    n = max(1, METHODS[method].others[0])
    own = [{}, *([{"weight": 0.5, "density": 0.5}] * n)]
    needed = {name: 0.5 for name, each in METHODS[method].shared.items() if each.is_needed}
    found = merge(method, [base] * (n + 1), 0, needed, own)
    assert torch.allclose(found.float(), base.float(), rtol=1e-2)
    if method not in ("slerp", "model_stock", "nearswap"):  # they add up parts of the base
        assert to_bytes(found.to(base.dtype)) == to_bytes(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_multislerp_of_tensors_that_nobody_or_not_everybody_changed(dtype: torch.dtype, n: int) -> None:
    base, one = drawn((20, 30), dtype, 1)
    own = [{}, *([{"weight": 1.0}] * n)]
    assert to_bytes(merge("multislerp", [base] * (n + 1), 0, None, own)) == to_bytes(base)
    assert to_bytes(merge("multislerp", [base * 0] * n, None, None, own[1:])) == to_bytes(base * 0)
    found = merge("multislerp", [base, one, *([base] * (n - 1))], 0, None, own)
    size, whole = (found - base).float().norm(), (one - base).float().norm()
    assert float(size) == pytest.approx(float(whole) / n, rel=0.05)


def test_multislerp_of_opposite_directions_adds_two_up_and_refuses_more() -> None:
    (x,) = drawn((20, 30), torch.float32, 0)
    two = merge("multislerp", [x, -2 * x], None, None, [{"weight": 1.0}] * 2)
    assert torch.allclose(two, -0.5 * x)
    own = [{"weight": 1.0}, {"weight": 1.0}, {"weight": 2.0}]
    with pytest.raises(
        IncompatibleInputs, match=r"mlp\.up_proj\.weight: the weighted sum of the models' directions is zero"
    ):
        merge("multislerp", [x, x, -x], None, None, own)


@settings(max_examples=20)
@given(st.integers(1, 5), st.floats(0.05, 1), st.integers(0, 2**32))
def test_ties_of_several_models_is_its_definition_in_float64(n: int, density: float, seed: int) -> None:
    base, *others = drawn((9, 13), torch.float64, n, seed=seed % 1000)
    k = max(1, int(density * base.numel()))
    trimmed = []
    for other in others:
        change = other - base
        least = change.abs().flatten().topk(k).values[-1]
        trimmed.append(torch.where(change.abs() >= least, change, 0) if least > 0 else change)
    up = sum(trimmed) >= 0
    agree = [((change > 0) & up) | ((change < 0) & ~up) for change in trimmed]
    total = sum(torch.where(a, change, 0) for a, change in zip(agree, trimmed, strict=True))
    expected = base + total / sum(agree).clamp(min=1)  # type: ignore[union-attr]
    found = merge("ties", [base, *others], 0, None, [{}, *([{"weight": 1.0, "density": density}] * n)])
    # sizes are compared as float32, so that few may tie
    assert int((~torch.isclose(found, expected, rtol=1e-12, atol=1e-15)).sum()) <= 2


def test_changes_too_small_to_have_energy_count_alike_in_sce() -> None:
    base = torch.zeros(1000)
    one, other = torch.full((1000,), 1e-4), torch.full((1000,), 3e-4)
    found = merge("sce", [base, one, other], 0)
    assert torch.allclose(found, torch.full((1000,), 2e-4))
    large = merge("sce", [base, one * 1e3, other * 1e3], 0)
    assert torch.allclose(large, torch.full((1000,), (0.1 * 0.1**2 + 0.3 * 0.3**2) / (0.1**2 + 0.3**2)))


TIES = {
    "all equal": [1.0] * 1500,
    "all zero": [0.0] * 1500,
    "two values": [1.0, 2.0] * 750,
    "signs": [1.0, -1.0] * 750,
    "zeros of both signs": [0.0, -0.0, 1.0] * 500,
    "subnormal": [2.0**-140, -(2.0**-141), 0.0, 2.0**-120] * 375,
    "neighbours": [math.nextafter(1.0, 2.0), 1.0, 1 + 2.0**-23, 1 - 2.0**-24] * 375,
    "one large": [0.0] * 1499 + [5.0],
}


@pytest.mark.parametrize("values", TIES.values(), ids=TIES)
def test_as_many_of_the_largest_are_kept_as_density_says_and_none_smaller(
    values: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "PIECE", 1024)
    change = torch.tensor(values)
    for density in (0.0005, 0.1, 1 / 3, 0.5, 0.999):
        own = [{}, {"weight": 1.0, "density": density}]
        found = merge("ties", [torch.zeros(len(values)), change], 0, {"normalize": False}, own)
        k = max(1, int(density * len(values)))
        expected = change.abs().topk(k).values
        assert torch.equal(found.abs().sort(descending=True).values[:k], expected.sort(descending=True).values)
        assert int(found.count_nonzero()) == int(expected.count_nonzero())
        assert torch.equal(found[found != 0], change[found != 0])


def test_of_equal_ones_those_are_kept_that_are_spread_evenly() -> None:
    found = merge("ties", [torch.zeros(3000), torch.ones(3000)], 0, None, [{}, {"weight": 1.0, "density": 0.25}])
    assert found.reshape(-1, 4).sum(dim=1).tolist() == [1.0] * 750


def test_numbers_that_are_none_count_as_the_largest() -> None:
    change = torch.tensor([1.0, math.nan, -3.0, math.inf, 2.0, -math.inf])
    own = [{}, {"weight": 1.0, "density": 0.5}]
    shared = {"normalize": False}
    found = merge("breadcrumbs", [torch.zeros(6), change], 0, shared, own, allow_nonfinite=True)
    expected = naively("breadcrumbs", [torch.zeros(6), change], 0, shared, own)
    assert torch.equal(found.nan_to_num(77, 88, 99), expected.nan_to_num(77, 88, 99))
    kept = merge("ties", [torch.zeros(6), change], 0, shared, own, allow_nonfinite=True)
    # NaN and both infinities are the three largest; NaN agrees with no sign, and times 0 it is NaN all the same
    assert kept.isnan().tolist() == [False, True, False, False, False, False]
    assert kept.nan_to_num(77, 88, 99).tolist() == [0.0, 77.0, 0.0, 88.0, 0.0, 99.0]


def test_what_is_dropped_of_infinities_is_nan() -> None:
    change = torch.tensor([1.0, math.inf, 3.0, 2.0])
    own = [{}, {"weight": 1.0, "density": 0.5, "gamma": 0.25}]
    found = merge("breadcrumbs", [torch.zeros(4), change], 0, None, own, allow_nonfinite=True)
    assert found.nan_to_num(77).tolist() == [0.0, 77.0, 3.0, 2.0]


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="there is no method dare-ties") as caught:
        find_method("dare-ties")
    assert "is dare_ties meant?" in str(caught.value.hint)


def test_bits_of_a_scalar_are_read_as_any() -> None:
    found = merge("ties", [torch.tensor(1.0), torch.tensor(3.0)], 0, None, [{}, {"weight": 1.0, "density": 0.1}])
    assert found.item() == 3.0
    assert from_bytes(to_bytes(found), torch.float32, ()).shape == ()
