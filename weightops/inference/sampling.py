"""Choosing the next token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightops.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose: the most probable token, or one drawn from the distribution.

    First the logits are changed, in transformers' order and with its results: tokens of the prompt and of the text are
    made less likely by `repetition_penalty` (Keskar et al. 2019, arXiv:1909.05858), and those ruled out that would
    repeat a run of `no_repeat_ngram_size` tokens. `presence_penalty` and `frequency_penalty` are taken off once, and as
    often as a token occurs in the new text, as OpenAI's API and vLLM do. `temperature` 0 then takes the best. Else
    `top_k` keeps the k most probable tokens, `top_p` the fewest of these that have so much of the probability (Holtzman
    et al. 2019, arXiv:1904.09751), and `min_p` those that have this share of the probability of the best (Nguyen et al.
    2024, arXiv:2407.01082), and one is drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"a temperature of {self.temperature} draws nothing", hint="give 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"the {self.top_k} most probable tokens are none", hint="give --top-k 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"a share of {self.top_p} of the probability", hint="give --top-p above 0 and up to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(
                f"a share of {self.min_p} of the best token's probability", hint="give --min-p between 0 and 1"
            )
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(
                f"a repetition penalty of {self.repetition_penalty} cannot divide", hint="give 1 for none, or more"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) < float("inf"):
                raise UsageError(f"a {name.replace('_', ' ')} of {getattr(self, name)}", hint="give 0 for none")
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 1:
            raise UsageError(
                f"runs of {self.no_repeat_ngram_size} tokens are none", hint="give --no-repeat-ngram-size 1 or more"
            )
        drawn_from = (self.top_k, self.top_p, self.min_p)
        if self.temperature == 0 and any(each is not None for each in drawn_from):
            raise UsageError(
                "--top-k, --top-p and --min-p say what to draw from, but at temperature 0 nothing is drawn",
                hint="give a --temperature, such as 1",
            )

    @property
    def penalizes(self) -> bool:
        """Whether what was said before changes what comes."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.no_repeat_ngram_size is not None
        )

    def probabilities(self, logits: Tensor) -> Tensor:
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
        found = scores.softmax(-1)
        if self.min_p is None:
            return found
        return scores.masked_fill((found < self.min_p * found.max()), -torch.inf).softmax(-1)


class Chooser:
    """Chooses the tokens of one text, one after the other; the same seed gives the same text."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._draw = torch.Generator().manual_seed(sampling.seed)
        self._text = list(prompt)
        self._seen = set(prompt)
        self._said = torch.tensor(sorted(self._seen))
        """Tokens of the text, each once."""
        self._new: Counter[int] = Counter()
        """How often each token is in the new text."""
        self._after: dict[tuple[int, ...], set[int]] = {}
        """What has followed each run of `no_repeat_ngram_size` - 1 tokens."""
        size = sampling.no_repeat_ngram_size
        if size is not None:
            for end in range(size, len(self._text) + 1):
                self._remember(end, size)

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits `[vocab]`."""
        sampling = self._sampling
        if sampling.penalizes:
            logits = self._penalized(logits.cpu())
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(sampling.probabilities(logits.cpu()).multinomial(1, generator=self._draw))
        if sampling.penalizes:
            self._text.append(token)
            self._new[token] += 1
            if token not in self._seen:
                self._seen.add(token)
                self._said = torch.cat([self._said, torch.tensor([token])])
            if sampling.no_repeat_ngram_size is not None:
                self._remember(len(self._text), sampling.no_repeat_ngram_size)
        return token

    def _remember(self, end: int, size: int) -> None:
        if end >= size:
            *run, last = self._text[end - size : end]
            self._after.setdefault(tuple(run), set()).add(last)

    def _penalized(self, logits: Tensor) -> Tensor:
        sampling, scores = self._sampling, logits.float().clone()
        if sampling.repetition_penalty != 1:
            said = self._said[self._said < len(scores)]
            old, penalty = scores[said], sampling.repetition_penalty
            scores[said] = torch.where(old < 0, old * penalty, old / penalty)
        if self._new and (sampling.presence_penalty or sampling.frequency_penalty):
            new, counts = torch.tensor(list(self._new)), torch.tensor(list(self._new.values()))
            scores[new] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        size = sampling.no_repeat_ngram_size
        if size is not None and len(self._text) + 1 >= size:
            run = tuple(self._text[len(self._text) + 1 - size :])
            scores[[token for token in self._after.get(run, ()) if token < len(scores)]] = -torch.inf
            if not bool(torch.isfinite(scores).any()):
                raise UsageError(
                    f"every token would repeat a run of {size} tokens", hint="give a larger --no-repeat-ngram-size"
                )
        return scores
