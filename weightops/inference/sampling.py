"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weightops.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose: the most probable token, or one drawn from the distribution.

    `temperature` 0 is greedy. `top_k` keeps the k most probable tokens, then `top_p` the fewest of these that have so
    much of the probability (Holtzman et al. 2019, arXiv:1904.09751); in the order and with the results of
    transformers' warpers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"a temperature of {self.temperature} draws nothing", hint="give 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"the {self.top_k} most probable tokens are none", hint="give --top-k 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"a share of {self.top_p} of the probability", hint="give --top-p above 0 and up to 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError(
                "--top-k and --top-p say what to draw from, but at temperature 0 nothing is drawn",
                hint="give a --temperature, such as 1",
            )

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """From logits `[vocab]` the probabilities `[vocab]` float32 to draw from."""
        scores = logits.float() / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = scores.sort()
            dropped = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            dropped[-1] = False
            scores = scores.index_fill(0, order[dropped], -torch.inf)
        return scores.softmax(-1)

    def choose(self, logits: torch.Tensor, draw: torch.Generator) -> int:
        """The next token, from logits `[vocab]`."""
        if self.temperature == 0:
            return int(logits.argmax())
        return int(self.probabilities(logits.cpu()).multinomial(1, generator=draw))
