"""The Triton kernels, run by Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gptq_layers import Layer, random_layer, random_x, relative_error
from weightops_kernels import launch, layout
from weightops_kernels.configs import REDUCTIONS, Config
from weightops_kernels.layout import Repacked

pytestmark = pytest.mark.skipif(launch.available() is not None, reason=str(launch.available()))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """numpy warns where the interpreter multiplies a masked lane's garbage; results are compared instead."""
    with np.errstate(all="ignore"):
        yield


def multiply(
    layer: Layer, x: torch.Tensor, config: Config, deterministic: bool = False
) -> tuple[torch.Tensor, Repacked]:
    """float32 sums into an output of NaNs."""
    weight = layout.repack(layer.packed)
    out = torch.full((x.shape[0], weight.out_features), torch.nan)
    return launch.matmul(x, weight, config, deterministic, out), weight


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """The same values, in a buffer that holds NaNs after and below them."""
    buffer = torch.full((x.shape[0] + 16, x.shape[1] + 128), torch.nan, dtype=x.dtype)
    buffer[: x.shape[0], : x.shape[1]] = x
    return buffer[: x.shape[0], : x.shape[1]]


SHAPES = [(1, 128, 32), (3, 200, 72), (16, 384, 128), (17, 136, 33), (2, 1, 3)]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("act_order", [False, True])
def test_four_bits_on_ragged_shapes_equal_float64(m: int, k: int, n: int, act_order: bool) -> None:
    for group_size in (128, 32, -1):
        layer = random_layer(k, n, group_size, act_order=act_order, seed=m)
        x = random_x(m, k)
        found, weight = multiply(layer, poisoned(x), Config(16, 32, split_k=2))
        assert weight.interleaved
        assert relative_error(found, x.double() @ layer.weight()) < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 8, 4])
def test_other_bits_and_uneven_groups_equal_float64(bits: int) -> None:
    cases = ((3, 200, 72), 100 if bits == 4 else 64, False), ((17, 136, 33), 24, True), ((2, 96, 64), 24, False)
    for (m, k, n), group_size, act_order in cases:
        layer = random_layer(k, n, group_size, bits, act_order, "gptq_v2", seed=k)
        x = random_x(m, k)
        found, weight = multiply(layer, poisoned(x), Config(16, 32, split_k=2))
        assert not weight.interleaved
        assert relative_error(found, x.double() @ layer.weight()) < 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_number_of_splits_gives_the_sum(reduction: str) -> None:
    layer, x = random_layer(640, 40), random_x(4, 640)
    for splits in (1, 2, 3, 5, 64):
        found, _ = multiply(layer, x, Config(16, 64, splits, reduction=reduction))
        assert relative_error(found, x.double() @ layer.weight()) < 1e-6


def test_deterministic_sums_have_the_same_bits_whatever_was_in_the_output() -> None:
    layer, x = random_layer(512, 64), random_x(8, 512)
    config = Config(16, 64, 4, reduction="atomic")
    first, weight = multiply(layer, x, config, deterministic=True)
    again = launch.matmul(x, weight, config, deterministic=True, out=torch.full((8, 64), 7.0))
    assert torch.equal(first, again)


def test_dequantised_weights_are_rounded_once_and_multiply_alike() -> None:
    for k, n, group_size, act_order in ((384, 96, 128, True), (200, 33, 32, False), (264, 40, -1, True)):
        layer, x = random_layer(k, n, group_size, act_order=act_order), random_x(3, k)
        weight = layout.repack(layer.packed)
        rows = slice(None) if weight.rows is None else weight.rows
        assert torch.equal(launch.dequantize(weight, torch.float16), layer.weight()[rows].half())
        found = launch.matmul(x, weight, Config(dequantize=True))
        assert relative_error(found, x.double() @ layer.weight()) < 2e-3


def test_scales_that_are_not_numbers_spoil_their_own_columns_only() -> None:
    layer, x = random_layer(256, 40), random_x(2, 256)
    layer.scales[1, 7] = torch.nan
    found, _ = multiply(layer, x, Config(16, 32))
    assert found.isnan().any(0).nonzero().flatten().tolist() == [7]


def test_outputs_are_of_the_type_of_x_and_empty_ones_are_fine() -> None:
    layer = random_layer(128, 32)
    weight = layout.repack(layer.packed)
    assert launch.matmul(random_x(2, 128), weight).dtype == torch.float16
    assert launch.matmul(random_x(0, 128), weight).shape == (0, 32)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    weight = layout.repack(random_layer(128, 32).packed)
    with pytest.raises(ValueError, match=r"x must be \[M, 128\]; found \[2, 64\]"):
        launch.matmul(random_x(2, 64), weight)
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        launch.matmul(random_x(2, 128).bfloat16(), weight)
    with pytest.raises(ValueError, match="found float32"):
        launch.matmul(random_x(2, 128).float(), weight)
    with pytest.raises(ValueError, match=r"out must be contiguous \[2, 32\]"):
        launch.matmul(random_x(2, 128), weight, out=torch.empty(32, 2).t())
