"""GPTQ of one layer, against a plain reference, against the outputs it is meant to keep, and where it cannot work."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.ops.gptq.solver import Factor, Settings, dequantized, factorise, round_to_nearest, solve

pytestmark = pytest.mark.usefixtures("one_thread")

ORDERS = {
    "natural": {"group_aware": False},
    "group-aware": {"group_aware": True},
    "act-order": {"desc_act": True},
    "static": {"desc_act": True, "static_groups": True},
}


def a_layer(columns: int, outputs: int, tokens: int = 1024, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [outputs, columns] and inputs [tokens, columns] that are correlated and of unequal size."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5
    size = torch.logspace(0, 1, columns)[torch.randperm(columns, generator=random)]
    inputs = (torch.randn(tokens, columns, generator=random) @ mix + torch.randn(tokens, 1, generator=random)) * size
    return torch.randn(outputs, columns, generator=random) * 0.02, inputs


def hessian_of(inputs: Tensor) -> Tensor:
    return 2 / len(inputs) * inputs.T @ inputs


def output_error(weight: Tensor, quantised: Tensor, inputs: Tensor) -> float:
    return float((inputs.double() @ (weight.double() - quantised.double()).T).square().sum() / len(inputs))


def reference(weight: Tensor, hessian: Tensor, chosen: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The paper's algorithm 1 with groups, plainly: q, scales, zeros [.., N] and g_idx."""
    outputs, columns = weight.shape
    width = columns if chosen.group_size == -1 else chosen.group_size
    maxq = 2**chosen.bits - 1

    def grid(values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        if chosen.sym:
            high = torch.maximum(low.abs(), high)
            return (high + high) / maxq, torch.full_like(high, (maxq + 1) / 2)
        scale = (high - low) / maxq
        return scale, torch.round(-low / scale)

    if chosen.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True)
    elif chosen.group_aware:
        inside = hessian.diagonal().reshape(-1, width).argsort(dim=1, descending=True)
        groups = hessian.diagonal().reshape(-1, width).amax(1).argsort(descending=True)
        order = (inside + width * torch.arange(columns // width)[:, None])[groups].reshape(-1)
    else:
        order = torch.arange(columns)
    in_place = chosen.desc_act and not chosen.static_groups
    groups = (torch.arange(columns) if in_place else order) // width
    w, h = weight.float()[:, order], hessian[order][:, order]
    h = h + torch.eye(columns) * (chosen.damp_percent * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    found = {g: grid(weight[:, g * width : (g + 1) * width]) for g in range(columns // width)}
    for i1 in range(0, columns, 128):
        i2 = min(i1 + 128, columns)
        errors = torch.zeros(outputs, i2 - i1)
        for i in range(i1, i2):
            if i % width == 0 and not chosen.static_groups:
                found[int(groups[i])] = grid(w[:, i : i + width])
            scale, zero = found[int(groups[i])]
            q[:, i] = torch.clamp(torch.round(w[:, i] / scale) + zero, 0, maxq)
            errors[:, i - i1] = (w[:, i] - scale * (q[:, i] - zero)) / u[i, i]
            w[:, i:i2] -= errors[:, i - i1, None] * u[i, i:i2]
        w[:, i2:] -= errors @ u[i1:i2, i2:]
    back = order.argsort()
    scales, zeros = (torch.stack([found[g][part] for g in sorted(found)]) for part in (0, 1))
    return q[:, back].T, scales, zeros, groups[back]


@pytest.mark.parametrize(("sym", "order"), list(itertools.product([True, False], ORDERS)))
def test_in_the_reference_order_the_integers_are_the_reference_s(sym: bool, order: str) -> None:
    weight, inputs = a_layer(384, 96)
    hessian = hessian_of(inputs)
    chosen = Settings(sym=sym, mse=False, v1=False, reference_order=True, **ORDERS[order])
    q, scales, zeros, g_idx = reference(weight, hessian, chosen)
    solved = solve(weight, hessian.clone(), chosen)
    assert torch.equal(solved.q.float(), q)
    assert torch.equal(solved.scales, scales.half())
    assert torch.equal(solved.zeros.float(), zeros)
    assert torch.equal(solved.g_idx.long(), g_idx)


@pytest.mark.parametrize(("sym", "order"), list(itertools.product([True, False], ORDERS)))
def test_the_faster_order_has_the_reference_s_error(sym: bool, order: str) -> None:
    weight, inputs = a_layer(384, 96)
    chosen = Settings(sym=sym, mse=False, v1=False, **ORDERS[order])
    fast = solve(weight, hessian_of(inputs), chosen)
    slow = solve(weight, hessian_of(inputs), replace(chosen, reference_order=True))
    assert fast.loss < 1.01 * slow.loss


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_much_closer_than_with_rounding_to_nearest(bits: int, sym: bool, order: str) -> None:
    weight, inputs = a_layer(256, 64)
    chosen = Settings(bits=bits, sym=sym, group_size=64, mse=False, **ORDERS[order])
    solved = solve(weight, hessian_of(inputs), chosen)
    nearest = round_to_nearest(weight, chosen, factor_of(inputs, chosen))
    assert solved.fallback is None
    assert solved.loss < 0.6 * nearest.loss
    assert solved.error_rtn == nearest.loss
    for result in (solved, nearest):
        assert result.loss == pytest.approx(output_error(weight, dequantized(result), inputs), rel=1e-4)


def factor_of(inputs: Tensor, chosen: Settings) -> Factor:
    factor = factorise(hessian_of(inputs), chosen)
    assert isinstance(factor, Factor)
    return factor


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_integers_scales_and_groups_make_the_weight(group_size: int, order: str) -> None:
    weight, inputs = a_layer(288, 40)
    solved = solve(weight, hessian_of(inputs), Settings(group_size=group_size, **ORDERS[order]))
    width = 288 if group_size == -1 else group_size
    assert (solved.q.dtype, solved.scales.dtype, solved.zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert solved.scales.shape == solved.zeros.shape == (288 // width, 40)
    assert solved.g_idx.bincount().tolist() == [width] * (288 // width)
    trivial = torch.equal(solved.g_idx, torch.arange(288, dtype=torch.int32) // width)
    assert trivial == (order != "act-order" or group_size == -1)
    for k, n in [(0, 0), (130, 7), (287, 39)]:
        g = int(solved.g_idx[k])
        value = float(solved.scales[g, n]) * (int(solved.q[k, n]) - int(solved.zeros[g, n]))
        assert float(dequantized(solved)[n, k]) == pytest.approx(value, rel=1e-6)


def test_a_factor_serves_all_layers_that_see_the_same_inputs() -> None:
    weight, inputs = a_layer(256, 64)
    chosen = Settings()
    factor = factor_of(inputs, chosen)
    first, second = solve(weight, factor, chosen), solve(weight, factor, chosen)
    alone = solve(weight, hessian_of(inputs), chosen)
    assert torch.equal(first.q, second.q)
    assert torch.equal(first.q, alone.q)
    assert first.loss == second.loss == alone.loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_as_they_are(dtype: torch.dtype) -> None:
    weight, inputs = a_layer(128, 32)
    weight = weight.to(dtype)
    kept = weight.clone()
    half = solve(weight, hessian_of(inputs), Settings())
    assert torch.equal(half.q, solve(weight.float(), hessian_of(inputs), Settings()).q)
    assert torch.equal(weight, kept)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_never_worse_than_rounding_and_never_a_scale_that_kernels_lose(data: st.DataObject) -> None:
    width, groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    outputs, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2**31))
    chosen = Settings(
        bits=data.draw(st.sampled_from([2, 3, 4, 8])),
        group_size=width,
        sym=data.draw(st.booleans()),
        mse=data.draw(st.booleans()),
        block_size=data.draw(st.sampled_from([1, 7, 128])),
        **ORDERS[data.draw(st.sampled_from(sorted(ORDERS)))],
    )
    weight, inputs = a_layer(width * groups, outputs, tokens=data.draw(st.integers(1, 60)), seed=seed)
    weight *= 10.0 ** data.draw(st.integers(-9, 5))
    if data.draw(st.booleans()):
        weight = weight.abs() * data.draw(st.sampled_from([-1, 1]))
    solved = solve(weight, hessian_of(inputs), chosen)
    assert solved.loss <= solved.error_rtn
    assert int(solved.q.max()) <= chosen.maxq
    assert bool((solved.scales >= 2.0**-14).all())
    assert bool(torch.isfinite(solved.scales).all())
    assert int(solved.zeros.max()) <= chosen.maxq
    assert int(solved.zeros.min()) >= 1
    # The factor differs from run to run in no bit, so nor does anything else.
    assert torch.equal(solved.q, solve(weight, hessian_of(inputs), chosen).q)


def test_where_rounding_to_nearest_is_better_it_is_taken() -> None:
    for seed in range(200):
        weight, inputs = a_layer(32, 1, seed=seed)
        solved = solve(weight, hessian_of(inputs), chosen := Settings(bits=2, group_size=8, mse=False))
        if solved.fallback:
            assert "exceeds" in solved.fallback
            assert torch.equal(solved.q, round_to_nearest(weight, chosen).q)
            return
    pytest.fail("GPTQ was better in every case: the case is not reached")


def test_columns_that_calibration_never_reached_are_rounded_to_nearest() -> None:
    weight, inputs = a_layer(128, 32)
    inputs[:, 10:20] = 0
    chosen = Settings(static_groups=True, mse=False)
    solved = solve(weight, hessian_of(inputs), chosen)
    nearest = round_to_nearest(weight, chosen)
    assert solved.dead_columns == 10
    assert solved.fallback is None
    assert torch.equal(solved.q[10:20], nearest.q[10:20])
    assert not torch.equal(solved.q, nearest.q)


def test_fewer_tokens_than_columns_are_enough() -> None:
    weight, inputs = a_layer(256, 32, tokens=20)
    solved = solve(weight, hessian_of(inputs), Settings())
    assert solved.fallback is None
    assert solved.damp == Settings().damp_percent
    assert solved.loss < 0.6 * solved.error_rtn


def coupled(size: float) -> Tensor:
    """A matrix with one great diagonal element, and two small ones of columns coupled by `size`: not definite."""
    matrix = torch.eye(32)
    matrix[5, 5] = 1000
    matrix[0, 1] = matrix[1, 0] = size
    return matrix


@pytest.mark.parametrize(("size", "damp", "floor"), [(5.0, 0.13, 0.0), (50.0, 0.99, 0.1)])
def test_damping_grows_as_far_as_it_must_and_then_the_diagonal_is_raised(
    size: float, damp: float, floor: float
) -> None:
    factor = factorise(coupled(size), Settings(group_size=32))
    assert isinstance(factor, Factor)
    assert factor.damp == pytest.approx(damp)
    assert factor.floor == pytest.approx(floor)
    damped = coupled(size)
    damped.diagonal().add_(damp * damped.diagonal().mean()).clamp_(min=floor * 1000)
    upper = factor.rows(0, 32).triu()
    squares = factor.matrix.diagonal().flip(0).square()
    assert torch.allclose(upper * squares @ upper.T, damped[factor.order][:, factor.order], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (torch.full((32, 32), float("nan")), "NaN"),
        (torch.eye(32) * float("inf"), "infinite"),
        (torch.zeros(32, 32), "no activation"),
        (coupled(1e9), "singular"),
    ],
)
def test_what_cannot_be_solved_is_rounded_to_nearest_with_the_reason(hessian: Tensor, reason: str) -> None:
    weight, _ = a_layer(32, 8)
    solved = solve(weight, hessian.clone(), Settings(group_size=32))
    assert solved.fallback is not None
    assert reason in solved.fallback
    assert torch.equal(solved.q, round_to_nearest(weight, Settings(group_size=32)).q)
    assert solved.loss != solved.loss


def test_weights_that_have_no_grid_are_refused() -> None:
    weight, inputs = a_layer(32, 8)
    chosen = Settings(group_size=32)
    weight[3, 7] = float("nan")
    with pytest.raises(CorruptInput, match=r"^h\.0\.x holds NaN or infinity"):
        solve(weight, hessian_of(inputs), chosen, label="h.0.x")
    weight[3, 7] = 1e6
    with pytest.raises(IncompatibleInputs, match=r"^h\.0\.x holds 1e\+06, too large for a float16 scale at 4 bits"):
        round_to_nearest(weight, chosen, label="h.0.x")
    with pytest.raises(UsageError, match="32 columns do not divide into groups of 24"):
        round_to_nearest(weight, Settings(group_size=24))
    with pytest.raises(IncompatibleInputs, match=r"has 32 columns, and its Hessian is \[16, 16\]"):
        solve(a_layer(32, 8)[0], torch.eye(16), chosen)


def test_weights_below_the_least_scale_are_counted() -> None:
    weight, inputs = a_layer(64, 8)
    solved = solve(weight * 1e-4, hessian_of(inputs), Settings(group_size=32))
    assert solved.floored_scales == 16
    assert solve(weight, hessian_of(inputs), Settings(group_size=32)).floored_scales == 0


@pytest.mark.parametrize(
    "wrong", [{"bits": 5}, {"group_size": 0}, {"damp_percent": 0.0}, {"damp_percent": 1.0}, {"block_size": 0}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"damping is a share|cannot have [05] (columns|bits)"):
        Settings(**wrong)  # type: ignore[arg-type]
