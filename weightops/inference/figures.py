"""What is measured of a model on a text, as values that are JSON too; they need no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from weightops.io.brief import brief


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean, or what is computed from means, with its standard error."""

    value: float
    error: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """What a number is like over all positions: its mean with its standard error, extremes, and percentiles."""

    mean: float
    error: float
    max: float
    min: float
    percentiles: dict[str, float]

    @property
    def median(self) -> float:
        """Half of the positions are below it."""
        return self.percentiles["50"]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A token, with the log-probability that the reference and the model give it."""

    token: int
    text: str
    reference: float
    model: float


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """A place in the text where the two differ: the number of the token that is to be predicted, and what is before it.

    `expected` is the token that the text has, where it has one. `of_reference` and `of_model` are the tokens that each
    finds the most probable. `is_tie`: they are other tokens, and what sets them apart is below the noise of the
    arithmetic, for both.
    """

    index: int
    kl: float
    context: str
    expected: str | None
    of_reference: Choice
    of_model: Choice
    is_tie: bool


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """How far a model's predictions are from a reference's, over all positions of all windows.

    `kl` is `sum(p_ref * log(p_ref / p))` in nats, `kl_reverse` the same with the two exchanged. `log_perplexity_ratio`
    is the logarithm of the model's perplexity over the reference's, `correlation` that of the two over positions;
    `probability` is the change of the probability of the token that the text has, `probability_rms` the root of its
    mean square. `top1` is the share of positions where both find the same token the most probable. Of the `differing`
    others, `ties` are such as a change of rounding may turn. `first` is the first of these that is no tie, or else the
    first: up to there, both would choose what the other does. `worst` are those with the largest `kl`.
    """

    kl: Spread
    kl_reverse: Spread
    log_perplexity_ratio: Estimate
    perplexity_ratio: Estimate
    correlation: float
    probability: Spread
    probability_rms: Estimate
    top1: Estimate
    differing: int
    ties: int
    first: Position | None
    worst: tuple[Position, ...]

    __repr__ = brief


class LayerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the blocks of a model change of what passes through them.

    `influence` has of each block 1 - E[cos(x, y)] over all tokens, x being what enters it and y what leaves it: the
    block influence of ShortGPT (arXiv 2403.03853). `distances[n - 1][i]` is the angular distance of arXiv 2403.17887,
    0 to 1: the mean angle over pi between what enters block i and what enters block i + n (or leaves the last), at the
    last token of each of the first `windows` windows. It is how much n blocks from i on change together.
    """

    influence: tuple[Estimate, ...]
    distances: tuple[tuple[float, ...], ...]
    windows: int

    __repr__ = brief


class ScoreDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A model in what `eval --json` prints.

    `nll` is in nats per predicted token; `perplexity`, its exponential, is null where that is more than a float holds.
    `nll_error` is its standard error. `engine` is there for a quantised model, from `kl_mean` on what is measured
    against a reference, and `layers` with --influence.
    """

    name: str
    perplexity: float | None
    nll: float
    nll_error: float
    tokens: int
    windows: int
    elapsed_s: float
    engine: Literal["auto", "dequantized", "packed"] | msgspec.UnsetType = msgspec.UNSET
    kl_mean: float | msgspec.UnsetType = msgspec.UNSET
    kl_max: float | msgspec.UnsetType = msgspec.UNSET
    top1_agreement: float | msgspec.UnsetType = msgspec.UNSET
    module_errors: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    divergence: Divergence | msgspec.UnsetType = msgspec.UNSET
    layers: LayerFigures | msgspec.UnsetType = msgspec.UNSET


class EvalDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-eval/1"):
    """What `eval --json` prints: the models on one text, by one convention; the reference comes first."""

    seq_len: int
    convention: str
    reference: str | None
    models: tuple[ScoreDocument, ...]
    warnings: tuple[str, ...]
