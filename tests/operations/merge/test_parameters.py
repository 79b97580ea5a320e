"""A parameter's value for a tensor: levels, filters, gradients."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from weightops.operations.merge.parameters import position, values
from weightops.operations.merge.settings import Rule, Settings
from weightops.ops.merging.method import Parameter


def missing(key: str) -> NoReturn:
    raise LookupError(key)


def find(*levels: Settings, name: str = "model.layers.1.mlp.up_proj.weight", at: float = 0.5, **kind: Any) -> Any:
    defaults = {"kind": float, "default": None, "is_optional": False, "of_each": True}
    return values({"x": Parameter("x", **{**defaults, **kind})}, levels, name, at, missing)["x"]


def test_the_first_rule_whose_text_is_in_the_name_counts_even_if_a_later_one_is_narrower() -> None:
    rules = (Rule(1.0, "mlp"), Rule(2.0, "mlp.up_proj"), Rule(3.0))
    assert find({"x": rules}) == 1.0
    assert find({"x": rules}, name="model.norm.weight") == 3.0


def test_what_no_rule_fits_is_looked_for_at_the_next_level_then_is_the_default() -> None:
    nearer, farther = {"x": (Rule(1.0, "self_attn"),)}, {"x": (Rule(2.0, "mlp"),)}
    assert find(nearer, farther) == 2.0
    assert find(nearer, {}, default=7.0) == 7.0
    assert find(nearer, is_optional=True) is None
    with pytest.raises(LookupError, match="x"):
        find(nearer)


@pytest.mark.parametrize(
    ("points", "at", "expected"),
    [
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.5, 0.3),
        ((0.0, 0.5, 0.3), 0.75, 0.4),
        ((0, 10), 0.25, 2),
        ((True, False, True), 0.49, True),
        ((True, False, True), 0.5, False),
    ],
)
def test_a_list_goes_over_the_layers(points: tuple[float, ...], at: float, expected: float) -> None:
    found = find({"x": (Rule(points),)}, at=at)
    assert found == pytest.approx(expected, abs=1e-15)
    assert type(found) is type(expected)


def test_the_only_layer_is_the_last() -> None:
    assert [position(0, 1), position(0, 3), position(1, 3), position(2, 3)] == [1.0, 0.0, 0.5, 1.0]
