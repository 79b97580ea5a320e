"""How far a model's predictions of the next token are from those of a reference, over the positions of a text.

The figures are those of llama.cpp's `llama-perplexity --kl-divergence`, so that they can be held beside what is
published, and KL divergence the other way round. Errors are standard errors of the mean, as there. Everything is
computed from whole distributions in float32, added up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from weightops.inference.figures import Choice, Divergence, Estimate, Position, Spread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)
WORST = 10
"""Positions that are listed."""
CONTEXT = 12
"""Tokens before a position that are shown with it."""
NOISE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Nats: what the log-probabilities of two likely tokens may be apart by the arithmetic alone. Measured on the small
model of the tests against float64, where 99.9 % of positions stay below 1e-5, 0.012 and 0.094."""


def is_tie(reference: tuple[float, float], model: tuple[float, float], noise: float) -> bool:
    """Whether what sets two tokens apart is below `noise`, for both of two models.

    Each gives the log-probabilities of the token that the reference chose, and of the one that the model chose.
    """
    return max(reference[0] - reference[1], model[1] - model[0]) <= noise


@dataclass(frozen=True)
class _Seen:
    """A position that may be listed: its number, and tokens with log-probabilities."""

    index: int
    kl: float
    tokens: tuple[int, int]
    reference: tuple[float, float]
    model: tuple[float, float]

    def is_tie(self, noise: float) -> bool:
        return self.tokens[0] != self.tokens[1] and is_tie(self.reference, self.model, noise)


@dataclass
class Agreements:
    """Takes in log-probabilities of a model and its reference, position by position; `noise` in nats (see `NOISE`)."""

    noise: float
    _kl: list[Floats] = field(default_factory=list)
    _reverse: list[Floats] = field(default_factory=list)
    _own: list[Floats] = field(default_factory=list)
    _theirs: list[Floats] = field(default_factory=list)
    _same: int = 0
    _ties: int = 0
    _first: _Seen | None = None
    _worst: list[_Seen] = field(default_factory=list)

    def add(self, found: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor, start: int) -> None:
        """Log-probabilities `[n, vocab]` of the model and the reference; `targets` `[m]` for the first m of them.

        `start` is the number of the token that the first position predicts.
        """
        kl = (expected.exp() * (expected - found)).sum(-1, dtype=torch.float64)
        reverse = (found.exp() * (found - expected)).sum(-1, dtype=torch.float64)
        self._kl.append(kl.cpu().numpy())
        self._reverse.append(reverse.cpu().numpy())
        known = len(targets)
        for kept, logs in ((self._own, found), (self._theirs, expected)):
            kept.append(logs[:known].gather(1, targets[:, None])[:, 0].double().cpu().numpy())
        theirs, own = expected.argmax(-1), found.argmax(-1)
        differing = (theirs != own).nonzero()[:, 0]
        self._same += len(kl) - len(differing)
        places = dict.fromkeys([*differing.tolist(), *kl.topk(min(WORST, len(kl))).indices.tolist()])
        pairs = torch.stack([theirs, own], -1)
        reference, model = (logs.gather(1, pairs).double().cpu() for logs in (expected, found))
        seen = {
            i: _Seen(start + i, float(kl[i]), *(tuple(t[i].tolist()) for t in (pairs, reference, model)))
            for i in places
        }
        for i in differing.tolist():
            is_tie = seen[i].is_tie(self.noise)
            self._ties += is_tie
            if self._first is None or (self._first.is_tie(self.noise) and not is_tie):
                self._first = seen[i]
        self._worst = sorted([*self._worst, *seen.values()], key=lambda each: -each.kl)[:WORST]

    def result(self, text_of: Callable[[int], str], before: Callable[[int], tuple[str, str | None]]) -> Divergence:
        """Everything so far. `text_of` gives a token's text, `before` what is before a position, and what is there."""
        kl, reverse = np.concatenate(self._kl), np.concatenate(self._reverse)
        own, theirs = np.concatenate(self._own), np.concatenate(self._theirs)
        change = np.exp(own) - np.exp(theirs)
        ratio = _estimate(theirs - own)
        squares = _estimate(change**2)
        rms = math.sqrt(max(0.0, squares.value))
        same = self._same / len(kl)
        spreads = np.std(own), np.std(theirs)
        together = float(np.mean((own - own.mean()) * (theirs - theirs.mean())))

        def place(seen: _Seen) -> Position:
            context, expected = before(seen.index)
            choices = [
                Choice(token=t, text=text_of(t), reference=a, model=b)
                for t, a, b in zip(seen.tokens, seen.reference, seen.model, strict=True)
            ]
            return Position(
                index=seen.index,
                kl=seen.kl,
                context=context,
                expected=expected,
                of_reference=choices[0],
                of_model=choices[1],
                is_tie=seen.is_tie(self.noise),
            )

        return Divergence(
            kl=_spread(kl),
            kl_reverse=_spread(reverse),
            log_perplexity_ratio=ratio,
            perplexity_ratio=Estimate(value=_exp(ratio.value), error=_exp(ratio.value) * ratio.error),
            correlation=together / float(spreads[0] * spreads[1]) if min(spreads) > 0 else 1.0,
            probability=_spread(change),
            probability_rms=Estimate(value=rms, error=0.5 / rms * squares.error if rms else 0.0),
            top1=Estimate(value=same, error=math.sqrt(same * (1 - same) / max(1, len(kl) - 1))),
            differing=len(kl) - self._same,
            ties=self._ties,
            first=None if self._first is None else place(self._first),
            worst=tuple(place(seen) for seen in self._worst if seen.kl > 0),
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _estimate(values: Floats) -> Estimate:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(value=float(values.mean()), error=error)


def _spread(values: Floats) -> Spread:
    mean = _estimate(values)
    found = np.percentile(values, PERCENTILES).tolist()
    return Spread(
        mean=mean.value,
        error=mean.error,
        max=float(values.max()),
        min=float(values.min()),
        percentiles={f"{at:g}": value for at, value in zip(PERCENTILES, found, strict=True)},
    )
