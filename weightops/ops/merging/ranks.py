"""Which elements have certain ranks in a tensor, exactly and in bounded memory.

A histogram of 16 bits of the elements' keys finds the bin of a rank in one pass; for keys of 32 bits another pass over
the lower 16 bits of what is in that bin finds it to the last bit. Counts are integers: no order of adding changes them.
Of elements that are equal where a range of ranks begins or ends, those are taken that are spread evenly over the
tensor: number j of m, where w are wanted, if (j + 1) w / m and j w / m have other whole parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.ops.merging.inputs import Inputs

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Keys = NDArray[Any]

_BINS = 1 << 16


@dataclass(frozen=True)
class Rank:
    """The key that has a rank: `below` keys are smaller, `tied` are equal to it."""

    key: int
    below: int
    tied: int


Ranks = Sequence[Sequence[int]]
KeysOf = Callable[["Sequence[torch.Tensor]", int], Sequence["Keys"]]
"""Makes arrays of keys of a block, and of the number of its first element."""


def find_ranks(
    inputs: Inputs,
    keys: KeysOf,
    ranks: Ranks | Callable[[Sequence[int]], Ranks],
) -> list[list[Rank]]:
    """Of each array of keys that `keys` makes of blocks, unsigned of 16 or 32 bits, those of these ranks, from 0.

    `ranks` may depend on how many keys of each array are zero.
    """
    is_short = False

    def tops(blocks: Sequence[torch.Tensor], first: int) -> Sequence[Keys]:
        nonlocal is_short
        found = keys(blocks, first)
        is_short = found[0].itemsize == 2
        return found if is_short else [*(each >> 16 for each in found), *((each != 0).view("u1") for each in found)]

    counts = list(_histograms(inputs, tops))
    zeros = [int(own[0]) for own in (counts if is_short else counts[len(counts) // 2 :])]
    wanted = ranks(zeros) if callable(ranks) else ranks
    bins = [[_find(own, rank) for rank in each] for own, each in zip(counts, wanted, strict=False)]
    if is_short:
        return bins
    chosen = sorted({(i, found.key) for i, own in enumerate(bins) for found in own})

    def rests(blocks: Sequence[torch.Tensor], first: int) -> list[Keys]:
        found = keys(blocks, first)
        return [found[i][found[i] >> 16 == top] & 0xFFFF for i, top in chosen]

    lows = dict(zip(chosen, _histograms(inputs, rests) if chosen else [], strict=True))
    return [
        [_refined(found, lows[i, found.key], rank) for found, rank in zip(own, each, strict=True)]
        for i, (own, each) in enumerate(zip(bins, wanted, strict=True))
    ]


def _refined(found: Rank, low: Keys, rank: int) -> Rank:
    own = _find(low, rank - found.below)
    return Rank(found.key << 16 | own.key, found.below + own.below, own.tied)


def _find(counts: Keys, rank: int) -> Rank:
    ends = counts.cumsum()
    key = int(ends.searchsorted(rank, side="right"))
    return Rank(key, int(ends[key] - counts[key]), int(counts[key]))


def _histograms(inputs: Inputs, keys: KeysOf) -> list[Keys]:
    """How often each key occurs in each of the arrays."""
    import numpy as np
    import torch

    def count(blocks: Sequence[torch.Tensor], first: int) -> list[Keys]:
        found = []
        for each in keys(blocks, first):
            words = torch.from_numpy(each.reshape(-1).astype(np.int32))
            found.append(torch.bincount(words, minlength=1).numpy())
        return found

    totals: list[Keys] = []
    for counts in inputs.over_blocks(count):
        totals = totals or [np.zeros(_BINS, np.int64) for _ in counts]
        for whole, part in zip(totals, counts, strict=True):
            whole[: len(part)] += part
    return totals


@dataclass(frozen=True)
class Between:
    """The elements with ranks from `low` to `high`, exclusive, by their keys in ascending order.

    `ends` are the keys at the first and the last of these ranks, once where they are one; none where there are no
    such ranks.
    """

    low: int
    high: int
    ends: tuple[Rank, ...]

    @property
    def _wanted(self) -> list[int]:
        """How many of those that tie at each end."""
        return [min(self.high, end.below + end.tied) - max(self.low, end.below) for end in self.ends]

    @property
    def has_ties(self) -> bool:
        """Whether some of equal elements are in and others are not."""
        return any(wanted != end.tied for wanted, end in zip(self._wanted, self.ends, strict=True))

    def tally(self, keys: Keys) -> list[int]:
        """How many of the keys tie at the first and at the last end."""
        import numpy as np

        counts = [int(np.count_nonzero(keys == end.key)) for end in self.ends]
        return [*counts, 0, 0][:2]

    def mask(self, keys: Keys, before: Sequence[int]) -> Keys:
        """Which of the keys are among them; `before` is the tally of all keys that come before these."""
        import numpy as np

        if not self.ends:
            return np.zeros(keys.shape, bool)
        first, last = self.ends[0], self.ends[-1]
        mask: Keys = (keys >= first.key) & (keys <= last.key)
        for end, wanted, count in zip(self.ends, self._wanted, before, strict=False):
            if wanted != end.tied:
                places = np.flatnonzero(keys == end.key)
                j = count + np.arange(len(places))
                mask.reshape(-1)[places] = (j + 1) * wanted // end.tied > j * wanted // end.tied
        return mask


def find_between(
    inputs: Inputs,
    keys: KeysOf,
    ranges: Sequence[tuple[int, int]] | Callable[[Sequence[int]], Sequence[tuple[int, int]]],
) -> list[Between]:
    """Of each array of keys the elements with these ranks, from and to, which may depend on how many keys are zero."""
    chosen: list[tuple[int, int]] = []

    def wanted(zeros: Sequence[int]) -> Ranks:
        chosen[:] = ranges(zeros) if callable(ranges) else ranges
        return [(low, high - 1) if low < high else () for low, high in chosen]

    found = find_ranks(inputs, keys, wanted)
    return [Between(low, high, tuple(dict.fromkeys(own))) for (low, high), own in zip(chosen, found, strict=True)]
