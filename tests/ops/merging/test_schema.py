"""What methods may be told is in their signatures: names, defaults, and what must be said, as mergekit 0.1.5 has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from weightops.ops.merging.method import Blockwise, Method
from weightops.ops.merging.methods import METHODS
from weightops.spec import DType

NEEDED = "needed"
_OF_CHANGES = {"normalize": False, "lambda": 1.0}
_THINNED = {**_OF_CHANGES, "rescale": False}
_AT_RANDOM = {**_OF_CHANGES, "rescale": True}
_WEIGHT = {"weight": NEEDED}
_DENSE = {**_WEIGHT, "density": 1.0}
_RAM = {"epsilon": 1e-5}
TABLE: dict[str, tuple[str, tuple[int, int | None], dict[str, Any], dict[str, Any]]] = {
    # base, others, shared parameters, those of each model
    "linear": ("input", (1, None), {"normalize": True}, _WEIGHT),
    "slerp": ("needed", (1, 1), {"t": NEEDED}, {}),
    "nuslerp": ("optional", (2, 2), {"nuslerp_flatten": True, "nuslerp_row_wise": False}, _WEIGHT),
    "multislerp": ("optional", (1, None), {"normalize_weights": True, "eps": 1e-8}, _WEIGHT),
    "karcher": ("input", (1, None), {"max_iter": 10, "tol": 1e-5}, {}),
    "task_arithmetic": ("needed", (0, None), _OF_CHANGES, _WEIGHT),
    "ties": ("needed", (0, None), {**_THINNED, "normalize": True}, _DENSE),
    "dare_linear": ("needed", (0, None), _AT_RANDOM, _DENSE),
    "dare_ties": ("needed", (0, None), _AT_RANDOM, _DENSE),
    "della": ("needed", (0, None), {**_AT_RANDOM, "normalize": True}, {**_DENSE, "epsilon": 0.15}),
    "della_linear": ("needed", (0, None), _AT_RANDOM, {**_DENSE, "epsilon": 0.15}),
    "breadcrumbs": ("needed", (0, None), _THINNED, {**_DENSE, "gamma": 0.01}),
    "breadcrumbs_ties": ("needed", (0, None), _THINNED, {**_DENSE, "gamma": 0.01}),
    "sce": ("needed", (1, None), {"select_topk": 1.0}, {}),
    "model_stock": ("needed", (2, None), {"filter_wise": False}, {}),
    "nearswap": ("needed", (1, 1), {"t": NEEDED}, {}),
    "arcee_fusion": ("needed", (1, 1), {}, {}),
    "ram": ("needed", (1, None), _RAM, {}),
    "ramplus_tl": ("needed", (1, None), {**_RAM, "r": 0.1, "alpha": 0.2}, {}),
    "passthrough": ("input", (1, 1), {}, {"scale": None}),
}


def said(method: Method, *, of_each: bool) -> dict[str, Any]:
    found = method.of_each if of_each else method.shared
    return {name: NEEDED if each.is_needed else each.default for name, each in found.items()}


def test_there_are_the_methods_of_the_table() -> None:
    assert set(METHODS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_method_is_as_in_the_table(name: str) -> None:
    method = METHODS[name]
    assert (method.name, method.base, method.others) == (name, *TABLE[name][:2])
    assert said(method, of_each=False) == TABLE[name][2]
    assert said(method, of_each=True) == TABLE[name][3]
    assert method.source
    assert method.is_random == name.startswith(("dare", "della"))


def test_types_are_those_of_the_signature() -> None:
    kinds = {name: each.kind for method in METHODS.values() for name, each in method.parameters.items()}
    bools = {"normalize", "rescale", "normalize_weights", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise"}
    assert {name for name, kind in kinds.items() if kind is bool} == bools
    assert {name for name, kind in kinds.items() if kind is int} == {"max_iter"}


def test_only_what_masks_in_float32_gives_float32() -> None:
    assert {name for name, method in METHODS.items() if method.dtype(DType.BF16) is DType.F32} == {
        "arcee_fusion",
        "ramplus_tl",
    }
    assert {method.dtype(DType.F64) for method in METHODS.values()} == {DType.F64}


def test_values_reach_the_function_by_the_names_that_merge_files_use() -> None:
    called = {}

    def mine(inputs: Any, *, weight: Sequence[float], lambda_: float = 1.0, until: int | None = None) -> Blockwise:
        called.update(inputs=inputs, weight=weight, lambda_=lambda_, until=until)
        return lambda blocks, first: torch.zeros(1)

    method = Method(mine, "here", "optional")
    assert said(method, of_each=False) == {"lambda": 1.0, "until": None}
    method.start("inputs", {"lambda": 0.5, "until": 3}, [{}, {"weight": 2.0}])
    assert called == {"inputs": "inputs", "weight": [None, 2.0], "lambda_": 0.5, "until": 3}


@pytest.mark.parametrize(
    ("method", "shared", "own", "problem"),
    [
        ("ties", {}, {"density": 1.5}, "density is 1.5, expected a share from 0 to 1"),
        ("breadcrumbs", {}, {"gamma": -0.1}, "gamma is -0.1"),
        ("della", {}, {"density": 0.9, "epsilon": 0.15}, "density ± epsilon must lie between 0 and 1"),
        ("della_linear", {}, {"density": 0.1, "epsilon": 0.15}, "density ± epsilon must lie between 0 and 1"),
        ("della", {}, {"density": 1.0, "epsilon": 0.15}, None),
        ("della", {}, {"density": 0.0, "epsilon": 0.15}, None),
        ("linear", {"normalize": True}, {"weight": 0.0}, "add up to 0"),
        ("linear", {"normalize": False}, {"weight": 0.0}, None),
        ("multislerp", {"normalize_weights": True}, {"weight": 0.0}, "add up to 0"),
    ],
)
def test_values_that_make_no_sense_are_told(
    method: str, shared: dict[str, Any], own: dict[str, Any], problem: str | None
) -> None:
    check = METHODS[method].check
    assert check is not None
    found = check(shared, [own, own])
    assert found is None if problem is None else problem in str(found)
