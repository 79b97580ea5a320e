"""Methods that choose elements by how much the models differ there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightops.ops.merging.bits import add, keep, magnitudes, number_of, ordered
from weightops.ops.merging.election import elected
from weightops.ops.merging.inputs import Inputs
from weightops.ops.merging.method import Blockwise, Tallied
from weightops.ops.merging.ranks import find_between, find_ranks
from weightops.ops.merging.spherical import total

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array = NDArray[Any]


def sce(inputs: Inputs, *, select_topk: float = 1.0) -> Blockwise | Tallied:
    """What varies most between the models, `select_topk` of it, in the direction of the most, by energy (2408.07990).

    A model's weight is the mean square of what is chosen of its changes.
    """
    import torch

    assert inputs.base is not None
    base, dtype = inputs.base, inputs.dtype
    wider = torch.float32 if torch.finfo(dtype).bits == 16 else torch.float64

    def largest(zeros: Sequence[int]) -> list[tuple[int, int]]:
        """The ranks of so many of those that are not zero."""
        n = inputs.numel
        return [(n - int((n - count) * select_topk), n) for count in zeros]

    def spread(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """The variance over the models, biased."""
        changes = [change.to(wider, copy=True) for change in inputs.changes(blocks)]
        mean = changes[0].clone()
        for change in changes[1:]:
            mean += change
        mean /= len(changes)
        squares = torch.zeros_like(mean)
        for change in changes:
            change -= mean
            squares.addcmul_(change, change)
        squares /= len(changes)
        return squares.to(dtype)

    chosen = None
    if select_topk < 1:
        (chosen,) = find_between(inputs, lambda blocks, first: [magnitudes(spread(blocks))], largest)

    def selected(blocks: Sequence[torch.Tensor], before: Any) -> list[torch.Tensor]:
        changes = inputs.changes(blocks)
        if chosen is None:
            return changes
        mask = chosen.mask(magnitudes(spread(blocks)), (0, 0) if before is None else before)
        return [keep(change, mask) for change in changes]

    def tally(blocks: Sequence[torch.Tensor], first: int) -> Array:
        import numpy as np

        return np.array(chosen.tally(magnitudes(spread(blocks))) if chosen else [0, 0])

    is_tallied = chosen is not None and chosen.has_ties
    before = inputs.before(tally, 0, inputs.numel)[0] if is_tallied else {}

    def squares(blocks: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        """In the tensors' own dtype, as mergekit squares, but added up in a wider one."""
        return torch.stack([total(c.square(), inputs.wide) for c in selected(blocks, before.get(first))])

    energies = sum(inputs.over_blocks(squares), start=torch.zeros((), dtype=torch.float64))
    energy = (energies / max(1, inputs.numel)).to(dtype)
    whole = energy.sum().item()
    weights = torch.ones_like(energy) / len(energy) if abs(whole) < 1e-6 else energy / whole

    def compute(blocks: Sequence[torch.Tensor], first: int, before: Any) -> torch.Tensor:
        changes = selected(blocks, before)
        change, counted = elected(changes, weights, weighted=True)
        return blocks[base] + change / add(counted).clamp(min=1e-6)

    if not is_tallied:
        return lambda blocks, first: compute(blocks, first, None)
    return Tallied(tally, compute)


def arcee_fusion(inputs: Inputs) -> Blockwise:
    """What matters most of the other model's changes, in the base: by size, and how far the rows' softmaxes part.

    An element is taken where its score is at least the median plus 1.5 times the distance of the quartiles, which are
    exact here; mergekit draws a million elements of larger tensors for them. The result is float32 at least.
    """
    import torch

    assert inputs.base is not None
    base, other = inputs.base, 1 - inputs.base
    dtype = inputs.dtype if torch.finfo(inputs.dtype).bits < 64 else torch.float32
    n, columns = inputs.numel, max(1, inputs.columns)
    divergences = torch.zeros(n // columns, 1, dtype=inputs.dtype)
    noted: set[int] = set()

    def sizes(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        return (blocks[other] - blocks[base]).abs()

    def scores(blocks: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        return sizes(blocks) * divergences[first // columns :][: len(blocks[0])]

    def note(blocks: Sequence[torch.Tensor], first: int) -> None:
        p, q = (torch.softmax(blocks[i], dim=-1) + 1e-8 for i in (other, base))
        divergences[first // columns :][: len(p)] = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)

    def keys(blocks: Sequence[torch.Tensor], first: int) -> list[Array]:
        if first not in noted:
            note(blocks, first)
            noted.add(first)
        return [ordered(scores(blocks, first).to(dtype))]

    wanted = [int(share * (n - 1)) for share in (0.25, 0.5, 0.75)]
    (found,) = find_ranks(inputs, keys, [wanted])
    # in the scores' own dtype, as mergekit has it
    numbers = [number_of(rank.key, dtype) for rank in found]
    low, middle, high = torch.tensor(numbers, dtype=torch.float64).to(inputs.dtype)
    limit = middle + 1.5 * (high - low)

    def compute(blocks: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        mask = (scores(blocks, first) >= limit).float()
        result: torch.Tensor = blocks[base] + (blocks[other] - blocks[base]) * mask
        return result

    return compute
