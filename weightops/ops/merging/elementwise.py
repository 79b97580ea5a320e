"""Methods whose every element depends on the same element of each model alone, or on counts besides.

The arithmetic is mergekit 0.1.5's to the bit: one rounding for each operation, in the tensors' own dtype, unless said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightops.ops.merging.bits import add, keep, magnitudes
from weightops.ops.merging.inputs import Inputs
from weightops.ops.merging.method import Blockwise

if TYPE_CHECKING:
    import torch


def linear(inputs: Inputs, *, weight: Sequence[float], normalize: bool = True) -> Blockwise:
    """The weighted mean, or with `normalize=False` the weighted sum, in float32 with one rounding at the end.

    Model soups: Wortsman and others, arXiv 2203.05482.
    """
    import torch

    together = torch.tensor(weight, dtype=inputs.wide)
    weights, divisor = list(together.unbind()), together.sum()

    def compute(blocks: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        total = torch.zeros(blocks[0].shape, dtype=inputs.wide)
        for block, factor in zip(blocks, weights, strict=True):
            total.addcmul_(block.to(inputs.wide), factor)  # with one rounding where the processor can
        if normalize:
            total /= divisor
        return total

    return compute


def cancels(shared: Mapping[str, Any], of_each: Sequence[Mapping[str, Any]]) -> str | None:
    """Refuse weights that add up to nothing, where what they give is divided by that."""
    weights = [values["weight"] for values in of_each if "weight" in values]
    normalize = shared.get("normalize", shared.get("normalize_weights", False))
    if normalize and weights and abs(sum(weights)) < 1e-8:
        return f"the weights {', '.join(f'{w:g}' for w in weights)} add up to 0, and are to be divided by their sum"
    return None


def passthrough(inputs: Inputs, *, scale: Sequence[float | None] = (None,)) -> Blockwise:
    """The one model as it is, or times `scale`."""
    factor = scale[0]
    return lambda blocks, first: blocks[0].clone() if factor is None else blocks[0] * factor


def nearswap(inputs: Inputs, *, t: float) -> Blockwise:
    """The base, and the other model where the two are closer than `t`; in between a mean of both."""
    assert inputs.base is not None
    base, other = inputs.base, 1 - inputs.base

    def compute(blocks: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        near = (t / (blocks[base] - blocks[other]).abs().clamp(min=1e-6)).clamp(0, 1)
        return near * blocks[other] + (1 - near) * blocks[base]

    return compute


def ram(inputs: Inputs, *, epsilon: float = 1e-5) -> Blockwise:
    """What one model alone changed by more than `epsilon` as it is, what several did as their mean.

    RAM: arXiv 2601.13572.
    """
    return _ram(inputs, epsilon, None)


def ramplus_tl(inputs: Inputs, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Blockwise:
    """`ram`, with what one model alone changed times `1 + r min(alpha, shared / alone)`, by its counts of elements."""
    import numpy as np

    def count(blocks: Sequence[torch.Tensor], first: int) -> Any:
        moved = _moved(inputs, blocks, epsilon)
        times = sum(each.view(np.int8) for each in moved)
        return np.array([[np.count_nonzero(m & (times > 1)), np.count_nonzero(m & (times == 1))] for m in moved])

    found = sum(inputs.over_blocks(count))
    rho = [np.float32(shared) / np.float32(max(alone, epsilon)) for shared, alone in found]
    factors = [np.float32(1) + np.float32(r) * np.clip(each, 0, np.float32(alpha)) for each in rho]
    return _ram(inputs, epsilon, factors)


def _ram(inputs: Inputs, epsilon: float, factors: Sequence[Any] | None) -> Blockwise:
    assert inputs.base is not None
    base = inputs.base

    def compute(blocks: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        import numpy as np
        import torch

        changes, moved = inputs.changes(blocks), _moved(inputs, blocks, epsilon)
        times = sum(each.view(np.int8) for each in moved)
        alone, shared = times == 1, times > 1
        divisor = torch.from_numpy(np.maximum(times, 1)).to(inputs.dtype)
        parts = []
        for i, (change, own) in enumerate(zip(changes, moved, strict=True)):
            mine = keep(change, own & alone)
            mine = mine if factors is None else mine * torch.tensor([factors[i]])  # a vector, which makes it float32
            parts.append(mine + keep(change, own & shared) / divisor)
        return blocks[base] + add(parts)

    return compute


def _moved(inputs: Inputs, blocks: Sequence[torch.Tensor], epsilon: float) -> list[Any]:
    """Where each model changed more than `epsilon`, rounded to the tensors' dtype: arrays of bools."""
    import torch

    limit = magnitudes(torch.tensor([epsilon], dtype=inputs.dtype))
    largest = magnitudes(torch.tensor([torch.inf], dtype=inputs.dtype))  # NaN is no larger than anything
    sizes = [magnitudes(change) for change in inputs.changes(blocks)]
    return [(size > limit) & (size <= largest) for size in sizes]
