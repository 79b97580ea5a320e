"""Task vectors: what each model changed of the base, thinned out, weighted, and added to it.

Editing models with task arithmetic: Ilharco and others, arXiv 2212.04089. TIES: Yadav and others, 2306.01708. DARE: Yu
and others, 2311.03099. Model Breadcrumbs: Davari and Belilovsky, 2312.06795. DELLA: Deep and others, 2406.11617. The
arithmetic, and what is left to choose, is mergekit 0.1.5's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightops.ops.merging.bits import add
from weightops.ops.merging.election import elected, ones_for_zeros
from weightops.ops.merging.inputs import Inputs
from weightops.ops.merging.method import Blockwise, Tallied
from weightops.ops.merging.sparsify import AtRandom, ByRank, ByRows, Sparsifier

if TYPE_CHECKING:
    import torch

Each = Sequence[float]


def task_arithmetic(
    inputs: Inputs, *, weight: Each, normalize: bool = False, lambda_: float = 1.0
) -> Blockwise | Tallied:
    """The base, and the weighted sum of what the others changed."""
    return _combine(inputs, weight, None, elect=False, normalize=normalize, scale=lambda_)


def ties(
    inputs: Inputs,
    *,
    weight: Each,
    density: Each = (1.0,),
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Blockwise | Tallied:
    """The largest changes of each model, `density` of them, that go in the direction which weighs most."""
    sparsifier = ByRank.largest(inputs, density, rescale=rescale)
    return _combine(inputs, weight, sparsifier, elect=True, normalize=normalize, scale=lambda_)


def dare_linear(
    inputs: Inputs,
    *,
    weight: Each,
    density: Each = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Blockwise | Tallied:
    """Each change kept with probability `density`, and what is kept scaled up to the whole's sum of sizes."""
    sparsifier = AtRandom(inputs, density, rescale=rescale)
    return _combine(inputs, weight, sparsifier, elect=False, normalize=normalize, scale=lambda_)


def dare_ties(
    inputs: Inputs,
    *,
    weight: Each,
    density: Each = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Blockwise | Tallied:
    """`dare_linear`, of which only what goes in the direction that weighs most."""
    sparsifier = AtRandom(inputs, density, rescale=rescale)
    return _combine(inputs, weight, sparsifier, elect=True, normalize=normalize, scale=lambda_)


def breadcrumbs(
    inputs: Inputs,
    *,
    weight: Each,
    density: Each = (1.0,),
    gamma: Each = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Blockwise | Tallied:
    """Changes of middle size: without the largest, `gamma` of them, the next `density` of them."""
    sparsifier = ByRank.middle(inputs, density, gamma, rescale=rescale)
    return _combine(inputs, weight, sparsifier, elect=False, normalize=normalize, scale=lambda_)


def breadcrumbs_ties(
    inputs: Inputs,
    *,
    weight: Each,
    density: Each = (1.0,),
    gamma: Each = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Blockwise | Tallied:
    """`breadcrumbs`, of which only what goes in the direction that weighs most."""
    sparsifier = ByRank.middle(inputs, density, gamma, rescale=rescale)
    return _combine(inputs, weight, sparsifier, elect=True, normalize=normalize, scale=lambda_)


def della(
    inputs: Inputs,
    *,
    weight: Each,
    density: Each = (1.0,),
    epsilon: Each = (0.15,),
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Blockwise | Tallied:
    """`dare_ties` with probabilities from `density - epsilon` to `density + epsilon`, by a change's rank in its row."""
    sparsifier = ByRows(inputs, density, epsilon, rescale=rescale)
    return _combine(inputs, weight, sparsifier, elect=True, normalize=normalize, scale=lambda_)


def della_linear(
    inputs: Inputs,
    *,
    weight: Each,
    density: Each = (1.0,),
    epsilon: Each = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Blockwise | Tallied:
    """`della`, of which everything that is kept counts, in whatever direction."""
    sparsifier = ByRows(inputs, density, epsilon, rescale=rescale)
    return _combine(inputs, weight, sparsifier, elect=False, normalize=normalize, scale=lambda_)


def unfit(shared: Mapping[str, Any], of_each: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with densities and what goes with them."""
    for values in of_each:
        for name in ("density", "gamma"):
            if not 0 <= values.get(name, 0) <= 1:
                return f"{name} is {values[name]:g}, expected a share from 0 to 1"
        density, epsilon = values.get("density", 1), values.get("epsilon")
        if epsilon is not None and 0 < density < 1 and not 0 < density - abs(epsilon) <= density + abs(epsilon) < 1:
            return f"density {density:g} and epsilon {epsilon:g}: density ± epsilon must lie between 0 and 1"
    return None


def _combine(
    inputs: Inputs, weight: Each, sparsifier: Sparsifier | None, *, elect: bool, normalize: bool, scale: float
) -> Blockwise | Tallied:
    """The base, and the weighted changes as `sparsifier` leaves them."""
    import torch

    assert inputs.base is not None
    base, dtype = inputs.base, inputs.dtype
    weights = torch.tensor(inputs.of_others(weight), dtype=dtype)
    together = weights.sum(dim=0)
    together = torch.where(together.abs() < 1e-8, 1, together)

    def compute(blocks: Sequence[torch.Tensor], first: int, before: Any) -> torch.Tensor:
        changes = inputs.changes(blocks)
        if not changes:
            return blocks[base].clone()
        if sparsifier is not None:
            changes = sparsifier.thin(changes, first, before)
        changes = [c if w == 1 else c * w for c, w in zip(changes, weights, strict=True)]
        change, counted = elected(changes, weights) if elect else (add(changes), [])
        if normalize:
            change = change / (ones_for_zeros(add(counted)) if elect else together)
        if scale != 1:
            change = change * scale
        return blocks[base] + change

    if sparsifier is None or not sparsifier.is_tallied:
        return lambda blocks, first: compute(blocks, first, None)
    tally = sparsifier.tally
    return Tallied(lambda blocks, first: tally(inputs.changes(blocks)), compute)
