"""NaN and infinities: refused by name where they are met, or merged as they are."""

from __future__ import annotations

import math

import pytest
import torch
from merging_cases import drawn
from naive_merging import merge

from weightops.errors import IncompatibleInputs
from weightops.ops.merging import inputs
from weightops.ops.merging.methods import METHODS

NEEDED = {"weight": 0.5, "density": 0.5}


def arguments(
    method: str, odd: float
) -> tuple[list[torch.Tensor], int | None, dict[str, float], list[dict[str, float]]]:
    """A base and models, of which the last has three numbers that are `odd`."""
    found = METHODS[method]
    n = max(1, found.others[0])
    tensors = drawn((30, 40), torch.float32, n)
    tensors[-1].reshape(-1)[[3, 5, 1190]] = odd
    shared = {name: 0.5 for name, each in found.shared.items() if each.is_needed}
    if method == "passthrough":
        return tensors[1:], None, shared, [{"scale": 0.5}]
    base = None if found.base == "input" else 0
    return tensors, base, shared, [NEEDED] * (n + 1)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_they_are_refused_with_the_tensor_the_model_and_how_many(method: str, odd: float) -> None:
    tensors, base, shared, own = arguments(method, odd)
    last = len(tensors) - 1
    with pytest.raises(
        IncompatibleInputs, match=rf"up_proj.weight: 3 of 1200 elements of a block of m{last} "
    ) as caught:
        merge(method, tensors, base, shared, own)
    assert "--allow-nonfinite" in str(caught.value.hint)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_merged_as_they_are_they_stay_where_they_are_or_spoil_what_depends_on_them(method: str) -> None:
    tensors, base, shared, own = arguments(method, math.nan)
    found = merge(method, tensors, base, shared, own, allow_nonfinite=True)
    where = torch.zeros(1200, dtype=torch.bool)
    where[[3, 5, 1190]] = True
    whole = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce"}
    spoilt = found.isnan().reshape(-1)
    assert spoilt[where].all()
    if method not in whole and METHODS[method].shared.get("rescale") is None:
        assert torch.equal(spoilt, where)


def test_only_the_block_they_are_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "PIECE", 1024)
    tensors = drawn((3000,), torch.float32, 1)
    tensors[1][2999] = math.nan
    with pytest.raises(IncompatibleInputs, match="1 of 952 elements of a block of m1"):
        merge("linear", tensors, None, None, [{"weight": 1.0}] * 2)


def test_numbers_that_are_too_large_together_are_refused() -> None:
    large = torch.full((5,), 6e4, dtype=torch.float16)
    with pytest.raises(IncompatibleInputs, match="merging by linear gives numbers that float16 cannot hold"):
        merge("linear", [large, large], None, {"normalize": False}, [{"weight": 1.0}] * 2)
    merged = merge("linear", [large] * 2, None, {"normalize": False}, [{"weight": 1.0}] * 2, allow_nonfinite=True)
    assert merged.tolist() == [math.inf] * 5


def test_numbers_whose_sum_alone_is_too_large_are_not() -> None:
    large = torch.full((2000,), 6e4, dtype=torch.float16)
    assert torch.equal(merge("linear", [large], None, None, [{"weight": 1.0}]), large)


def test_infinity_times_zero_is_nan() -> None:
    tensors = [torch.tensor([math.inf, 1.0]), torch.tensor([1.0, 2.0])]
    found = merge("linear", tensors, None, None, [{"weight": 0.0}, {"weight": 1.0}], allow_nonfinite=True)
    assert found.nan_to_num(77).tolist() == [77.0, 2.0]


def test_a_draw_counts_as_up_beside_numbers_that_are_none_too() -> None:
    models = [torch.tensor([math.nan, 1.0, -2.0]), torch.tensor([1.0, -1.0, 2.0])]
    own = [{}, *([{"weight": 1.0}] * 2)]
    found = merge("ties", [torch.zeros(3), *models], 0, None, own, allow_nonfinite=True)
    assert found.nan_to_num(77).tolist() == [77.0, 1.0, 2.0]
