"""Thinning out what models changed: by size, at random, or by both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightops.ops.merging.bits import keep, l1_norm, magnitudes
from weightops.ops.merging.inputs import Inputs
from weightops.ops.merging.ranks import find_between

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array = NDArray[Any]

_MAX_KEPT_NBYTES = 16 << 20
"""Masks of a tensor that are drawn for their sums are kept for the result, unless they take more."""
_LITTLE = 1e-7


class Sparsifier(ABC):
    """Which elements of each change are kept, and by what they are scaled for those that are not.

    With `rescale` what is kept is multiplied by the sum of all sizes over that of those kept, as mergekit does; papers
    have it 1 / density. A density of 1 keeps all, one of 0 nothing.
    """

    is_tallied = False
    """Whether what is kept of a block depends on the blocks before it."""

    def __init__(self, inputs: Inputs, densities: Sequence[float], *, rescale: bool) -> None:
        self.inputs, self.densities = inputs, inputs.of_others(densities)
        self._rescales = rescale
        self.thinned = [i for i, density in enumerate(self.densities) if 0 < density < 1]
        """The places of the changes of which something is kept, and not all."""

    @abstractmethod
    def mask(self, place: int, change: torch.Tensor, first: int, before: Any) -> Array:
        """What is kept of the change at that place: bools in its shape."""

    def tally(self, changes: Sequence[torch.Tensor]) -> Array:
        """What `before` adds up, for those that depend on what comes before a block."""
        raise NotImplementedError

    def work_dtype(self) -> torch.dtype:
        """In which what is kept is scaled."""
        return self.inputs.dtype

    def thin(self, changes: Sequence[torch.Tensor], first: int, before: Any) -> list[torch.Tensor]:
        """The changes with zeros where nothing is kept, and scaled."""

        work = self.work_dtype()
        found = [change if density > 0 else change * 0 for change, density in zip(changes, self.densities, strict=True)]
        for place in self.thinned:
            change, factor = changes[place], self._factors[place]
            kept = keep(change, self.mask(place, change, first, before))
            found[place] = kept if factor is None else (kept.to(work) * factor).to(change.dtype)
        return found

    def prepare(self) -> None:
        """Do the pass that scaling takes, if there is one."""
        import numpy as np
        import torch

        self._factors: list[torch.Tensor | None] = [None] * len(self.densities)
        if not self._rescales or not self.thinned:
            return
        sums = np.zeros((len(self.densities), 2))
        for part in self.inputs.over_blocks_after(self.tally if self.is_tallied else None, self._sums):
            sums += part
        for place, (before, after) in enumerate(torch.tensor(sums).to(self.work_dtype())):
            if before >= _LITTLE and after >= _LITTLE:
                self._factors[place] = before / after

    def _sums(self, blocks: Sequence[torch.Tensor], first: int, before: Any) -> Array:
        import numpy as np

        found = np.zeros((len(self.densities), 2))
        changes = self.inputs.changes(blocks)
        for place in self.thinned:
            change = changes[place]
            found[place] = l1_norm(change), l1_norm(keep(change, self.mask(place, change, first, before)))
        return found


class ByRank(Sparsifier):
    """Keeps changes whose sizes have certain ranks, exactly; of equal ones, evenly spread ones."""

    def __init__(
        self, inputs: Inputs, densities: Sequence[float], ranges: Sequence[tuple[int, int]], *, rescale: bool
    ) -> None:
        super().__init__(inputs, densities, rescale=rescale)
        wanted = [ranges[place] for place in self.thinned]

        def keys(blocks: Sequence[torch.Tensor], first: int) -> list[Array]:
            changes = inputs.changes(blocks)
            return [magnitudes(changes[place]) for place in self.thinned]

        self._ranges = dict(zip(self.thinned, find_between(inputs, keys, wanted), strict=True)) if wanted else {}
        self.is_tallied = any(each.has_ties for each in self._ranges.values())
        self.prepare()

    @classmethod
    def largest(cls, inputs: Inputs, densities: Sequence[float], *, rescale: bool) -> ByRank:
        """Those of the largest size, `density` of them, and at least one."""
        n = inputs.numel
        ranges = [(n - max(1, int(density * n)), n) for density in inputs.of_others(densities)]
        return cls(inputs, densities, ranges, rescale=rescale)

    @classmethod
    def middle(cls, inputs: Inputs, densities: Sequence[float], gammas: Sequence[float], *, rescale: bool) -> ByRank:
        """Without the largest, `gamma` of them, the next `density` of them."""
        n, ranges = inputs.numel, []
        for density, gamma in zip(inputs.of_others(densities), inputs.of_others(gammas), strict=True):
            count = int(density * n)
            low = max(0, n - count - int(gamma * n))
            ranges.append((low, low + count))
        return cls(inputs, densities, ranges, rescale=rescale)

    def mask(self, place: int, change: torch.Tensor, first: int, before: Any) -> Array:
        return self._ranges[place].mask(magnitudes(change), (0, 0) if before is None else before[place])

    def tally(self, changes: Sequence[torch.Tensor]) -> Array:
        import numpy as np

        found = np.zeros((len(self.densities), 2), np.int64)
        for place, own in self._ranges.items():
            if own.has_ties:
                found[place] = own.tally(magnitudes(changes[place]))
        return found


class _Random(Sparsifier):
    """Keeps changes by chance. Masks are drawn once where there is room to keep them."""

    def __init__(self, inputs: Inputs, densities: Sequence[float], *, rescale: bool) -> None:
        import numpy as np

        super().__init__(inputs, densities, rescale=rescale)
        nbytes = -(-inputs.numel // 8)
        fits = rescale and inputs.step % 8 == 0 and nbytes * len(self.thinned) <= _MAX_KEPT_NBYTES
        self._masks: dict[int, Array] = {p: np.empty(nbytes, np.uint8) for p in self.thinned} if fits else {}
        self._are_drawn = False
        self.prepare()
        self._are_drawn = True

    @abstractmethod
    def draw(self, place: int, change: torch.Tensor, first: int) -> Array:
        """The mask, from random numbers."""

    def work_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.inputs.dtype == torch.bfloat16 else torch.float32

    def mask(self, place: int, change: torch.Tensor, first: int, before: Any) -> Array:
        import numpy as np

        bits = self._masks.get(place)
        if bits is not None and self._are_drawn:
            begin, skipped = divmod(first, 8)
            own = bits[begin : begin + -(-(skipped + change.numel()) // 8)]
            found = np.unpackbits(own, bitorder="little")[skipped : skipped + change.numel()]
            return found.view(bool).reshape(change.shape)
        drawn = self.draw(place, change, first)
        if bits is not None:
            packed = np.packbits(drawn.reshape(-1), bitorder="little")
            bits[first // 8 : first // 8 + len(packed)] = packed
        return drawn

    def _random(self, place: int, change: torch.Tensor, first: int) -> Array:
        return self.inputs.draws(self.inputs.others[place], first, change.numel()).reshape(tuple(change.shape))


class AtRandom(_Random):
    """Keeps each change with probability `density`."""

    def draw(self, place: int, change: torch.Tensor, first: int) -> Array:
        import numpy as np

        found: Array = self._random(place, change, first) < np.uint32(self.densities[place] * (1 << 32))
        return found


class ByRows(_Random):
    """Keeps changes with probabilities around `density`: up to `epsilon` less for the smallest of a row, more for the
    largest. Equal sizes have one probability. A row lies along the last dimension; a vector is one."""

    def __init__(self, inputs: Inputs, densities: Sequence[float], epsilons: Sequence[float], *, rescale: bool) -> None:
        self._epsilons = inputs.of_others(epsilons)
        super().__init__(inputs, densities, rescale=rescale)

    def draw(self, place: int, change: torch.Tensor, first: int) -> Array:
        import numpy as np

        density, epsilon = self.densities[place], self._epsilons[place]
        ranks = _mean_ranks(magnitudes(change))
        last = max(1, ranks.shape[-1] - 1)
        share = ranks / np.float32(last) if ranks.shape[-1] > 1 else np.float32(0.5)
        chance = (np.float32(density - epsilon) + share * np.float32(2 * epsilon)) * np.float32(1 << 32)
        found: Array = self._random(place, change, first).astype(np.float32) < chance
        return found


def _mean_ranks(keys: Array) -> Array:
    """The rank of each key in its row, from 0; equal ones have the mean of theirs. float32."""
    import numpy as np

    rows, columns = keys.shape
    places = keys.argsort(axis=-1, kind="stable")
    places += np.arange(0, keys.size, columns)[:, None]
    flat = places.reshape(-1)
    ordered = keys.reshape(-1)[flat]
    begins_group = np.empty(keys.size, bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins_group[1:])
    begins_group[::columns] = True
    begins = np.flatnonzero(begins_group)
    sizes = np.diff(begins, append=keys.size)
    found = np.empty(keys.size, np.float32)
    found[flat] = np.repeat((begins % columns + (sizes - 1) / 2).astype(np.float32), sizes)
    return found.reshape(rows, columns)
