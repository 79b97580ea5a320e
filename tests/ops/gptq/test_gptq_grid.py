"""Grids: what they span, which zero points they have, and that the search finds the best clipping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.ops.gptq.grid import Settings, find, levels, spans

pytestmark = pytest.mark.usefixtures("one_thread")


def span(scale: float, zero: float, maxq: int) -> tuple[float, float]:
    return -scale * zero, scale * (maxq - zero)


@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    v1=st.booleans(),
    low=st.floats(-3, 3, width=32),
    high=st.floats(-3, 3, width=32),
)
def test_a_grid_reaches_from_the_least_to_the_greatest_weight(
    bits: int, sym: bool, v1: bool, low: float, high: float
) -> None:
    chosen = Settings(bits=bits, sym=sym, mse=False, v1=v1)
    values = torch.tensor([[low], [high]])
    scale, zero = find(values, chosen)
    first, last = span(float(scale), float(zero), chosen.maxq)
    # The ends may lie up to half a step outside, which is where they round to anyhow, and float16 rounds the scale.
    slack = float(scale) * (0.51 + chosen.maxq * 2**-11)
    assert first - slack <= min(0, low, high)
    assert max(0, low, high) <= last + slack
    assert float(zero) >= (1 if sym or v1 else 0)
    assert scale == scale.half().float()
    assert bool((values - scale * (levels(values, scale, zero, chosen.maxq) - zero)).abs().max() <= slack)


@pytest.mark.parametrize("values", [[0.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
@pytest.mark.parametrize("sym", [True, False])
def test_weights_of_one_sign_are_not_cut_in_half(values: list[float], sym: bool) -> None:
    chosen = Settings(bits=4, sym=sym, mse=False)
    weights = torch.tensor(values)[:, None]
    scale, zero = find(weights, chosen)
    back = scale * (levels(weights, scale, zero, 15) - zero)
    assert torch.allclose(back, weights, atol=0.51 * float(scale))


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from([2, 3, 4]), sym=st.booleans(), v1=st.booleans(), seed=st.integers(0, 2**31))
def test_the_search_takes_the_best_of_80_shrunken_grids(bits: int, sym: bool, v1: bool, seed: int) -> None:
    chosen = Settings(bits=bits, sym=sym, v1=v1)
    values = torch.randn(64, 5, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.01
    scale, zero = find(values, chosen)
    best = torch.full((5,), float("inf"), dtype=torch.float64)
    for step in range(80):
        ends = torch.stack(torch.aminmax(values, dim=0)) * (1 - step / 100)
        s, z = find(ends, chosen_without_search(chosen))
        back = s * (levels(values, s, z, chosen.maxq) - z)
        best = torch.minimum(best, (back - values).double().abs().pow(2.4).sum(0))
    error = (scale * (levels(values, scale, zero, chosen.maxq) - zero) - values).double().abs().pow(2.4).sum(0)
    assert torch.allclose(error, best, rtol=1e-4)


def chosen_without_search(chosen: Settings) -> Settings:
    return Settings(bits=chosen.bits, sym=chosen.sym, v1=chosen.v1, mse=False)


@given(stop=st.integers(1, 500), unit=st.integers(1, 200), size=st.integers(1, 200))
def test_pieces_cover_all_and_units_begin_pieces_or_lie_inside_them(stop: int, unit: int, size: int) -> None:
    pieces = list(spans(0, stop, unit, size))
    assert [k for a, b in pieces for k in range(a, b)] == list(range(stop))
    for a, b in pieces:
        assert b - a <= size
        assert a // unit == (b - 1) // unit or (a % unit == 0 and (b % unit == 0 or b == stop))
