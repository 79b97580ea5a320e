"""Whether a base is one: models that were tuned from it differ from it by a fraction of its weights.

The norms of the base and of what each model changed are taken on the way, over one run of 1024 elements in sixteen,
which tells them to a percent and costs nothing that can be measured. They are noted for each matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightops.io.escape import escape

if TYPE_CHECKING:
    import torch

    from weightops.ops.merging.inputs import Inputs

_RUN, _ONE_IN = 1024, 16
_BASE, _CHANGE = "base_norm", "change_norm."
LIMIT = 0.5
"""The change of a model over its base, as norms over all matrices, from which on the base is doubted."""


class Sampler:
    """Adds up squares of a sample of the base and of the changes, block by block, each block once."""

    def __init__(self, inputs: Inputs, models: Sequence[str]) -> None:
        self._inputs = inputs
        self._names = [_BASE, *(f"{_CHANGE}{models[i]}" for i in inputs.others)]
        self._sums = [0.0] * len(self._names)
        self._seen = 0

    def squares(self, blocks: Sequence[torch.Tensor]) -> Any:
        """The squares of a block: of the base, and of each change."""
        import torch

        assert self._inputs.base is not None
        parts = [self._sample(block).to(self._inputs.wide) for block in blocks]
        base = parts[self._inputs.base]
        changes = [parts[i] - base for i in self._inputs.others]
        return torch.stack([part.square().sum().double() for part in (base, *changes)]).tolist()

    def _sample(self, block: torch.Tensor) -> torch.Tensor:
        flat = block.reshape(-1)
        whole = flat.numel() // (_RUN * _ONE_IN) * _RUN * _ONE_IN
        return flat[:whole].view(-1, _ONE_IN, _RUN)[:, 0] if whole else flat

    def add(self, found: Sequence[Any], start: int, stop: int) -> None:
        """What blocks from `start` to `stop` have, unless something before them was left out."""
        if start == self._seen:
            self._seen = stop
            for squares in found:
                self._sums = [total + square for total, square in zip(self._sums, squares, strict=True)]

    def note(self, numel: int) -> dict[str, float]:
        """Norms by name; none unless everything has been seen."""
        if self._seen != numel or not all(map(math.isfinite, self._sums)):
            return {}
        return {name: math.sqrt(total) for name, total in zip(self._names, self._sums, strict=True)}


def doubts(notes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What to say of a base, from the notes on all tensors of a merge."""
    found = [note for note in notes.values() if _BASE in note]
    names = dict.fromkeys(name for note in found for name in note if name.startswith(_CHANGE))
    said = []
    for name in names:
        own = [note for note in found if name in note]
        base, change = (math.sqrt(sum(note[key] ** 2 for note in own)) for key in (_BASE, name))
        if change > LIMIT * base:
            ratio = change / base if base else math.inf
            said.append(
                f"{escape(name.removeprefix(_CHANGE))} differs from the base by {ratio:.2f} of its size, over "
                "all matrices: is it tuned from that base? Methods that add up changes want models that are"
            )
    return said
