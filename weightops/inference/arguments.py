"""What a model gives its blocks beside the hidden states: position embeddings, masks, alibi."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
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


def beyond_hidden_states(of_blocks: Sequence[dict[str, Any]], tokens: torch.Tensor) -> str | None:
    """The name of an argument by which blocks get at more of a text than hidden states and places; None if none does.

    That is one computed from weights, which require gradients here, or from the tokens (embeddings of a layer's own),
    or a mapping that blocks hand on what they have found in (keys and values that later ones share).
    """
    return next((name for given in of_blocks for name, value in given.items() if _is_of_text(value, tokens)), None)


def _is_of_text(value: Any, tokens: torch.Tensor) -> bool:
    if isinstance(value, torch.Tensor):
        return value is tokens or value.requires_grad
    if isinstance(value, MutableMapping):
        return not value or any(_is_of_text(each, tokens) for each in value.values())
    return isinstance(value, list | tuple) and any(_is_of_text(each, tokens) for each in value)


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
