"""Random masks: the share that is kept, no likeness between any two, and the same ones everywhere for one seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from naive_merging import chances, lazily, merge
from numpy.typing import NDArray
from support import evaluate, to_bytes

from weightops.lazy import Evaluator
from weightops.ops.merging.inputs import Inputs

SIGMAS = 5.5
"""One mask in thirty million is further off by chance."""
N = 1 << 16
SHAPE = (64, 1024)
RAW = [0xDF4034B829E9FBA4, 0x4B9D10CDF8E64087, 0x6B8B857E506AAC98]
"""The first words of numpy's Philox with the key 7."""
WORDS = [0x12BB7E5B, 0xA5BEB62E, 0xD17902CA, 0xF97BA8AD, 0xA34C6A7C, 0xB7F4D16F]
"""The first draws for the model at place 1 and the tensor x, with the seed 0."""
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def mask(
    method: str = "dare_linear",
    density: float = 0.3,
    *,
    name: str = "x",
    seed: int = 0,
    model: int = 1,
    change: torch.Tensor | None = None,
) -> NDArray[Any]:
    """1 where a change is kept, and 0 where not: that of a model at this place of the file."""
    change = torch.ones(SHAPE) if change is None else change
    tensors = [torch.zeros_like(change)] * 4
    tensors[model] = change
    own = [{}, *({"weight": 1.0, "density": density if i == model else 1.0} for i in range(1, 4))]
    found = merge(method, tensors, 0, {"rescale": False, "normalize": False}, own, name=name, seed=seed)
    kept: NDArray[Any] = (found != 0).numpy().reshape(-1)
    return kept


def off(sum_of_units: float, n: int) -> float:
    """How many standard deviations a sum of `n` numbers of mean 0 and variance 1 is away from 0."""
    return abs(float(sum_of_units)) / math.sqrt(n)


def units(kept: NDArray[Any], chance: Any) -> NDArray[Any]:
    found: NDArray[Any] = (kept - chance) / np.sqrt(chance * (1 - chance))
    return found


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
def test_the_share_that_is_kept_is_the_density_in_the_whole_and_in_every_part(density: float) -> None:
    for method in ("dare_linear", "dare_ties"):
        found = units(mask(method, density), density)
        assert off(found.sum(), N) < SIGMAS
        assert max(off(part.sum(), len(part)) for part in np.array_split(found, 64)) < SIGMAS


@pytest.mark.parametrize("method", RANDOM)
def test_densities_of_0_and_1_are_exact(method: str) -> None:
    assert not mask(method, 0.0).any()
    assert mask(method, 1.0).all()


def test_a_mask_does_not_repeat_itself() -> None:
    found = units(mask(), 0.3)
    for step in (1, 2, 3, 4, 7, 8, 16, 64, 256, 1024, 4096, 32768):
        assert off((found[step:] * found[:-step]).sum(), N - step) < SIGMAS, step


def others() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "another tensor", {"name": "y"}
    yield "another tensor, whose name begins with it", {"name": "xx"}
    yield "another model", {"model": 2}
    yield "another seed", {"seed": 1}


@pytest.mark.parametrize("change", [dict(pair[1]) for pair in others()], ids=[pair[0] for pair in others()])
def test_masks_are_not_like_each_other_at_any_shift(change: dict[str, Any]) -> None:
    one, other = units(mask(), 0.3), units(mask(**change), 0.3)
    for step in (0, 1, 2, 8, 1024, 4096):
        assert off((one[step:] * other[: N - step]).sum(), N - step) < SIGMAS, step
        assert off((other[step:] * one[: N - step]).sum(), N - step) < SIGMAS, step


def test_runs_of_eight_are_as_frequent_as_chance_has_them() -> None:
    """Chi-square over the 256 patterns of eight neighbours at density 1/2; its standard deviation is √(2 · 255)."""
    patterns = np.packbits(mask(density=0.5))
    counts = np.bincount(patterns, minlength=256)
    expected = len(patterns) / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < SIGMAS * math.sqrt(2 * 255)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_large_changes_are_kept_more_often_by_their_rank_in_the_row(method: str) -> None:
    change = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).abs() + 0.1
    kept = mask(method, 0.5, change=change)
    chance = chances(change, {"density": 0.5, "epsilon": 0.15}).reshape(-1)
    found = units(kept, chance)
    assert off(found.sum(), N) < SIGMAS
    for low in np.arange(0.35, 0.65, 0.05):
        tenth = (chance >= low) & (chance < low + 0.05)
        assert off(found[tenth].sum(), int(tenth.sum())) < SIGMAS
    assert kept[chance > 0.6].mean() > kept[chance < 0.4].mean() + 0.15


def test_equal_changes_of_a_row_have_one_chance() -> None:
    change = torch.ones(SHAPE)
    assert np.all(chances(change, {"density": 0.4, "epsilon": 0.3}) == 0.4)
    first, last = np.array_split(mask("della", 0.4).reshape(SHAPE), 2, axis=1)
    assert off(units(first, 0.4).sum(), N // 2) < SIGMAS
    assert off(units(last, 0.4).sum(), N // 2) < SIGMAS


@pytest.mark.parametrize("method", RANDOM)
def test_one_seed_gives_the_same_bytes_in_any_blocks_and_another_seed_others(method: str) -> None:
    random = torch.Generator().manual_seed(1)
    tensors = [torch.randn(33, 100, generator=random) for _ in range(3)]
    own = [{"weight": 1.0, "density": 0.5}] * 3
    lazy = lazily(method, tensors, 0, None, own, seed=9)
    assert evaluate(lazy) == evaluate(lazy, 1300) == to_bytes(merge(method, tensors, 0, None, own, seed=9))
    assert evaluate(lazy) != to_bytes(merge(method, tensors, 0, None, own, seed=10))


def test_methods_that_draw_nothing_do_not_depend_on_the_seed() -> None:
    tensors = [torch.ones(5), torch.zeros(5)]
    own = [{"weight": 1.0}] * 2
    assert lazily("ties", tensors, 0, None, own, seed=1) == lazily("ties", tensors, 0, None, own, seed=2)


def test_the_numbers_are_those_of_philox() -> None:
    """numpy promises that the words of a generator stay; masks of merges that were published depend on it."""
    assert np.random.Philox(key=7).random_raw(3).tolist() == RAW
    with Evaluator() as read:
        inputs = Inputs(lazily("ties", [torch.zeros(1)], None, None, [{}]).inputs, None, "0\0x", read)
        assert inputs.draws(1, 0, 6).tolist() == WORDS
        assert inputs.draws(1, 3, 2).tolist() == WORDS[3:5]
        whole = inputs.draws(2, 0, 4000)
        assert np.array_equal(inputs.draws(2, 1111, 333), whole[1111:1444])
        assert inputs.draws(2, 0, 6).tolist() != WORDS
