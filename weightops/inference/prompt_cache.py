"""Keys and values of texts that were read, for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from weightops.inference.forwards import cache_nbytes, is_croppable


@dataclass(frozen=True)
class _Kept:
    tokens: list[int]
    cache: Any


class PromptCache:
    """The caches of the last few texts of a model, each of which is lent to one text at a time."""

    def __init__(self, slots: int = 1) -> None:
        self._slots = slots
        self._kept: list[_Kept] = []
        """The one used last comes last."""

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(cache_nbytes(each.cache) for each in self._kept)

    def take(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """A cache of the first tokens of a prompt, and of how many; None and 0 where a new one is to be made.

        It is the one that has most of the prompt. It is left alone where that is less than half of what it has, if
        there is a slot for another. The last token of the prompt is always left to be read.
        """
        if not self._kept:
            return None, 0
        best = max(self._kept, key=lambda each: _common(each.tokens, prompt))
        count = min(_common(best.tokens, prompt), len(prompt) - 1)
        if count < 1 or (2 * count < len(best.tokens) and len(self._kept) < self._slots):
            return None, 0
        self._kept.remove(best)
        best.cache.crop(count - len(best.tokens))
        return best.cache, count

    def keep(self, tokens: Sequence[int], cache: Any) -> None:
        """Keep the cache of a text, if it can be cut; the one that was used longest ago gives way."""
        if not self._slots or not is_croppable(cache):
            return
        read = cache.get_seq_length()
        if 0 < read <= len(tokens):
            self._kept = [*self._kept, _Kept(list(tokens[:read]), cache)][-self._slots :]

    def clear(self) -> None:
        """Give all of it back."""
        self._kept = []


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
