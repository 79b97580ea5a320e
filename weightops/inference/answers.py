"""What several models answer to the same prompts, side by side, as values that are JSON too; they need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal

import msgspec

from weightops.inference.events import Candidate, Finish
from weightops.io.brief import brief
from weightops.io.notebook import card


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a prompt has no answer: the error's class, and what it says."""

    error: str
    message: str


class Scored(Candidate, frozen=True, kw_only=True):
    """A token of the text, and the most probable tokens in its place; the model's own, before temperature."""

    top: tuple[Candidate, ...]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A model's answer to a prompt, and how it ended; one that has "failed" has `error` in the place of all the rest.

    `logprobs`, one for each token, are there if they were asked for.
    """

    finish: Finish | Literal["failed"]
    text: str = ""
    prompt_tokens: int = 0
    tokens: tuple[int, ...] = ()
    elapsed_s: float = 0.0
    logprobs: tuple[Scored, ...] | msgspec.UnsetType = msgspec.UNSET
    error: Refusal | msgspec.UnsetType = msgspec.UNSET

    @property
    def is_failed(self) -> bool:
        """Whether there is no answer."""
        return self.finish == "failed"


class NextToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token that one of two models chose, with the log-probabilities that A and the other model give it.

    One is null where the token is not among the most probable ones of that model.
    """

    token: int
    text: str
    a: float | None
    model: float | None


class Parting(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model's answer leaves that of A: `characters` of the texts are the same, and then `tokens` of them.

    `tokens` is thus the number, from 0, of the first new token that is another; null where the vocabularies differ.
    `of_a` and `of_model` are the tokens that each chose there, null where its text was over. `is_tie` says that what
    sets the two tokens apart is below the noise of the arithmetic, for both models; null where that cannot be said:
    of texts that are drawn or penalised, of prompts that the two read as other tokens, or where a token is missing.
    """

    characters: int
    tokens: int | None = None
    of_a: NextToken | None = None
    of_model: NextToken | None = None
    is_tie: bool | None = None


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """A model's answer against that of A: whether the texts are `equal`, null if one failed, or where they part."""

    equal: bool | None
    parting: Parting | None = None


class PromptAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, what all models answer, A first, and what each of the others is to A.

    `index` counts prompts from 0, `id` is what the prompt's line had for it, `prompt` its text, or what is said last in
    a conversation.
    """

    index: int
    id: str | int | None
    prompt: str
    answers: tuple[Answer, ...]
    against: tuple[Against, ...]

    @property
    def common(self) -> str:
        """What all answers begin with; empty where there is no second one."""
        texts = [answer.text for answer in self.answers if not answer.is_failed]
        # What the first and the last in the order of the alphabet have in common, all between them have.
        return min(texts)[: common(min(texts), max(texts))] if len(texts) > 1 else ""


class Agreed(msgspec.Struct, frozen=True, kw_only=True):
    """How often a model answers what A does: `equal` of the `prompts` that both have an answer to.

    Of the others `ties` part at a tie. `median_tokens` is the median of the numbers of equal tokens before they part;
    null where none part, or the vocabularies differ.
    """

    model: str
    prompts: int
    equal: int
    ties: int
    median_tokens: float | None


class AnswersReport(msgspec.Struct, frozen=True, kw_only=True):
    """The `models`, A first, what they answer to each prompt, and how far the others agree with A."""

    models: tuple[str, ...]
    dtype: str
    prompts: tuple[PromptAnswers, ...]
    agreed: tuple[Agreed, ...]
    warnings: tuple[str, ...]

    __repr__ = brief

    def _repr_html_(self) -> str:
        heads = ("model", "prompts", "equal", "ties", "equal tokens (median)")
        rows = [
            (each.model, each.prompts, each.equal, each.ties, "" if each.median_tokens is None else each.median_tokens)
            for each in self.agreed
        ]
        return card(f"Answers against {self.models[0]}", {"dtype": self.dtype}, heads, rows, what="models")

    @property
    def failed(self) -> int:
        """How many answers there are not."""
        return sum(answer.is_failed for prompt in self.prompts for answer in prompt.answers)


def common(a: Sequence[object], b: Sequence[object]) -> int:
    """How many of the first elements are equal."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def agreed(model: str, found: Sequence[Against]) -> Agreed:
    """How often a model answers what A does, from its answers to all prompts."""
    partings = [each.parting for each in found if each.parting is not None]
    places = [parting.tokens for parting in partings if parting.tokens is not None]
    return Agreed(
        model=model,
        prompts=sum(each.equal is not None for each in found),
        equal=sum(each.equal is True for each in found),
        ties=sum(parting.is_tie is True for parting in partings),
        median_tokens=float(median(places)) if places else None,
    )
