"""What a model gives its blocks beside the hidden states: position embeddings, masks, alibi."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class BlockArguments(dict[str, Any]):
    """What block 0 is given beside the hidden states, by name; `of_blocks` says it of every block.

    Layers of one model may differ in it: in some every other one attends to a sliding window.
    """

    def __init__(self, of_blocks: Sequence[dict[str, Any]]) -> None:
        super().__init__(of_blocks[0])
        self.of_blocks = of_blocks

    def equals(self, other: BlockArguments) -> bool:
        """Whether every block is given the same; tensors that several share are looked at once."""
        return _equal(list(self.of_blocks), list(other.of_blocks), set())


def _equal(left: Any, right: Any, seen: set[tuple[int, int]]) -> bool:
    if left is right or (id(left), id(right)) in seen:
        return True
    if isinstance(left, torch.Tensor):
        found = isinstance(right, torch.Tensor) and torch.equal(left, right)
    elif isinstance(left, dict):
        found = left.keys() == right.keys() and all(_equal(value, right[key], seen) for key, value in left.items())
    elif isinstance(left, list | tuple):
        found = len(left) == len(right) and all(_equal(a, b, seen) for a, b in zip(left, right, strict=True))
    else:
        found = True  # flags, and objects that hold no tensor
    if found:
        seen.add((id(left), id(right)))
    return found
