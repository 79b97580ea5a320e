"""Which changes go in the direction of the sum of all, element by element: TIES' election of signs (2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightops.ops.merging.bits import add, all_or_none, bits_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def elected(
    changes: Sequence[torch.Tensor], weights: torch.Tensor, *, weighted: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum of the changes that go in the direction of the sum of all; of each its weight, and 0 where it does not.

    A sum of zero counts as going up; a change of zero goes nowhere. If `weighted`, each change counts times its weight
    in the first sum.
    """
    whole = add(changes)
    choose = _chosen if math.isfinite(whole.sum().item()) else _chosen_by_value
    kept, counted = choose(changes, weights, whole)
    if weighted:
        kept = [change * weight for change, weight in zip(kept, counted, strict=True)]
    return add(kept), counted


def ones_for_zeros(x: torch.Tensor) -> torch.Tensor:
    """With ones where there are zeros."""
    import numpy as np
    import torch

    bits = bits_of(x)
    is_zero = all_or_none(bits & np.iinfo(bits.dtype).max == 0, bits.dtype)
    return torch.from_numpy(bits | (is_zero & bits_of(torch.ones(1, dtype=x.dtype)))).view(x.dtype)


_Chosen = tuple[list["torch.Tensor"], list["torch.Tensor"]]


def _chosen(changes: Sequence[torch.Tensor], weights: torch.Tensor, whole: torch.Tensor) -> _Chosen:
    """The changes and weights of elements that go the way of the whole, and zeros; of finite numbers, by their bits."""
    import numpy as np
    import torch

    total: NDArray[Any] = bits_of(whole)
    sign = np.iinfo(total.dtype).min
    turned = all_or_none((total < 0) & (total != sign), total.dtype) & sign
    kept, counted = [], []
    for change, weight in zip(changes, weights, strict=True):
        bits = bits_of(change)
        mask = all_or_none((bits ^ turned) > 0, total.dtype)
        kept.append(torch.from_numpy(bits & (mask | sign)).view(change.dtype))
        counted.append(torch.from_numpy(mask & bits_of(weight.reshape(1))).view(change.dtype))
    return kept, counted


def _chosen_by_value(changes: Sequence[torch.Tensor], weights: torch.Tensor, whole: torch.Tensor) -> _Chosen:
    """The same where there are NaN or infinities, which times zero are NaN."""
    goes_up = (whole >= 0).to(whole.dtype) * 2 - 1
    agree = [change.sign() == goes_up for change in changes]
    kept = [change * each for change, each in zip(changes, agree, strict=True)]
    return kept, [weight * each for weight, each in zip(weights, agree, strict=True)]
