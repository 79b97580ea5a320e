"""Task arithmetic as peft does it on the factors of adapters, or on their products: linear, TIES, DARE, by magnitude.

Source: `peft.utils.merge_utils` of peft 0.21, in float32 and in its order of operations. It is not mergekit's: the sign
is voted for without weights, and what goes its way is divided by how many do, not by their weights. Of equal
magnitudes, where peft keeps any, those are kept that spread evenly; DARE's masks are those of `weightops.ops.merging`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from weightops.ops.merging.inputs import draws
from weightops.ops.merging.ranks import Between, Rank

if TYPE_CHECKING:
    from numpy.typing import NDArray

Rule = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
SignVote = Literal["total", "frequency"]
"""What decides on the sign of an element: the sum of all, or how many have it."""


def combine(
    rule: Rule,
    tensor: Callable[[int], NDArray[Any]],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    vote: SignVote = "total",
    key: str = "",
    places: Sequence[int] = (),
) -> NDArray[Any]:
    """One tensor of several, in float32.

    `tensor(i)` gives number `i`, in memory of its own; it is asked for twice where signs are voted for, so that few are
    held at once. `density` is the share that is kept, of the largest or at random. `key` and `places` are what random
    masks depend on: the seed with the tensor's name, and the place of each in the list.
    """
    import numpy as np

    def thinned(i: int) -> NDArray[Any]:
        values = tensor(i)
        if rule == "linear" or density >= 1:
            return values
        if rule.startswith("dare"):
            words = draws(key, places[i], 0, values.size).reshape(values.shape)
            values *= words < np.uint32(density * (1 << 32))
            values /= np.float32(density)
            return values
        values *= largest(values, density)
        return values

    numbers = range(len(weights))
    if not rule.endswith("ties"):
        total = thinned(0) * np.float32(weights[0])
        for i in numbers[1:]:
            values = thinned(i)
            values *= np.float32(weights[i])
            total += values
        return total
    votes = _ballot(thinned(0), vote)
    for i in numbers[1:]:
        votes += _ballot(thinned(i), vote)
    goes_up = votes >= 0
    total, count = np.zeros_like(votes), np.zeros(votes.shape, np.uint8)
    for i in numbers:
        values = thinned(i)
        agrees = np.where(goes_up, values > 0, values < 0)
        count += agrees
        values *= np.float32(weights[i])
        values *= agrees
        total += values
    total /= np.maximum(count, 1)
    return total


def _ballot(values: NDArray[Any], vote: SignVote) -> NDArray[Any]:
    import numpy as np

    return np.sign(values, out=values) if vote == "frequency" else values


def largest(values: NDArray[Any], density: float) -> NDArray[Any]:
    """Which elements are among the `int(density * n)` largest in size: bools in the shape of `values`, of float32."""
    import numpy as np

    count = int(density * values.size)
    if not count:
        return np.zeros(values.shape, bool)
    keys = np.ascontiguousarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)
    low = values.size - count
    key, top = np.partition(keys.reshape(-1), low)[low], keys.max()
    ends = dict.fromkeys(Rank(int(k), int((keys < k).sum()), int((keys == k).sum())) for k in (key, top))
    return Between(low, values.size, tuple(ends)).mask(keys, (0, 0))
