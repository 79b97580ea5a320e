"""The same prompts to several models of a pool, and where their answers part.

A model answers all prompts before the next one begins, so that models which do not fit together are loaded once each.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from weightops.engine.control import Control
from weightops.errors import CorruptInput, UsageError, WeightopsError
from weightops.inference.agreement import NOISE, is_tie
from weightops.inference.answers import (
    Against,
    Answer,
    AnswersReport,
    NextToken,
    Parting,
    PromptAnswers,
    Refusal,
    Scored,
    agreed,
    common,
)
from weightops.inference.chat import error_of
from weightops.inference.events import Failed, Finished, Started, Token
from weightops.inference.opened import Opened
from weightops.inference.pool import Pool, Request
from weightops.inference.prompt_file import Wanted
from weightops.inference.prompts import Conversation, Prompted, prompted_all
from weightops.inference.settings import Settings

_TOP = 20
"""Most probable tokens that are kept of each place, so that the token of another model is found among them."""


@dataclass
class _Said:
    """An answer, the tokens of its prompt, and of each new token the most probable ones with their log-probabilities.

    These are kept as numbers: as events they would take a hundred times the memory.
    """

    answer: Answer
    prompt: Sequence[int] = ()
    widths: list[int] = field(default_factory=list)
    ids: array[int] = field(default_factory=lambda: array("q"))
    logprobs: array[float] = field(default_factory=lambda: array("d"))

    def push(self, token: Token) -> None:
        found = {each.id: each.logprob for each in token.top}
        if token.logprob is not None:  # of one that was drawn, and is not among them
            found[token.id] = token.logprob
        self.widths.append(len(found))
        self.ids.extend(found)
        self.logprobs.extend(found.values())

    def at(self, index: int) -> dict[int, float]:
        """Log-probabilities by token at a place; empty where there is none."""
        start = sum(self.widths[:index])
        end = start + (self.widths[index] if index < len(self.widths) else 0)
        return dict(zip(self.ids[start:end], self.logprobs[start:end], strict=True))


def answer_side_by_side(pool: Pool, wanted: Sequence[Wanted], *, control: Control | None = None) -> AnswersReport:
    """Answers of all models of a pool, each against those of the first.

    A prompt that a model cannot answer is so recorded, and the others go on. Raises `NoRoom` for a model that does not
    fit, and what reading its weights raises.
    """
    control = control or Control()
    names = pool.names
    said = {name: _answers(pool, name, wanted, control) for name in names}
    first, *others = (pool.model(name) for name in names)
    vocabulary = first.tokenizer.get_vocab()
    against = []
    for name, other in zip(names[1:], others, strict=True):
        is_same = other.tokenizer.get_vocab() == vocabulary
        against.append(
            [
                _against(first, a, b, is_same=is_same, is_greedy=_is_greedy(each.settings))
                for each, a, b in zip(wanted, said[names[0]], said[name], strict=True)
            ]
        )
    return AnswersReport(
        models=tuple(pool.model(name).checkpoint.name for name in names),
        dtype=str(first.model.dtype).removeprefix("torch."),
        prompts=tuple(
            PromptAnswers(
                index=each.index,
                id=each.id,
                prompt=_shown(each),
                answers=tuple(said[name][i].answer for name in names),
                against=tuple(found[i] for found in against),
            )
            for i, each in enumerate(wanted)
        ),
        agreed=tuple(agreed(other.checkpoint.name, found) for other, found in zip(others, against, strict=True)),
        warnings=tuple(dict.fromkeys(warning for name in names for warning in pool.model(name).warnings)),
    )


def _answers(pool: Pool, name: str, wanted: Sequence[Wanted], control: Control) -> list[_Said]:
    opened = pool.model(name)
    found = []
    for each, prompt in zip(wanted, prompted_all(opened, [each.prompt for each in wanted]), strict=True):
        control.check()
        try:
            if isinstance(prompt, WeightopsError):
                raise prompt
            opened.max_new_tokens(prompt.tokens, each.settings.max_new_tokens)
        except WeightopsError as error:
            refusal = Refusal(error=type(error).__name__, message=str(error))
            found.append(_Said(Answer(finish="failed", error=refusal)))
            continue
        found.append(_answer(pool, name, each, prompt))
    return found


def _answer(pool: Pool, name: str, wanted: Wanted, prompt: Prompted) -> _Said:
    asked = wanted.settings.logprobs
    settings = wanted.settings if wanted.settings.num_beams > 1 else replace(wanted.settings, logprobs=_TOP)
    said = _Said(Answer(finish="failed"), prompt.tokens)
    scored: list[Scored] = []
    has_started = False
    with pool.submit([Request(name, prompt, settings)]) as texts:
        for event in texts:
            if isinstance(event, Started):
                has_started = True
            elif isinstance(event, Token):
                said.push(event)
                if asked is not None and event.logprob is not None:
                    text = pool.model(name).text_of(event.id)
                    scored.append(Scored(id=event.id, text=text, logprob=event.logprob, top=event.top[:asked]))
            elif isinstance(event, Finished):
                said.answer = Answer(
                    finish=event.finish,
                    text=event.text,
                    prompt_tokens=event.prompt_tokens,
                    tokens=event.tokens,
                    elapsed_s=round(event.elapsed_s, 3),
                    logprobs=msgspec.UNSET if asked is None else tuple(scored),
                )
            elif isinstance(event, Failed):
                # What fails before the prompt is read is the model's fault, and would be so for all others.
                error = error_of(event)
                if not has_started or not isinstance(error, CorruptInput | UsageError):
                    raise error
                said.answer = Answer(finish="failed", error=Refusal(error=event.error, message=event.message))
    return said


def _against(first: Opened, a: _Said, b: _Said, *, is_same: bool, is_greedy: bool) -> Against:
    """`is_same`: a number is the same token to both."""
    if a.answer.is_failed or b.answer.is_failed:
        return Against(equal=None)
    one, other = a.answer.text, b.answer.text
    if one == other:
        return Against(equal=True)
    characters = common(one, other)
    if not is_same:
        return Against(equal=False, parting=Parting(characters=characters))
    at = common(a.answer.tokens, b.answer.tokens)
    by_a, by_b = a.at(at), b.at(at)

    def chosen(tokens: Sequence[int]) -> NextToken | None:
        if at >= len(tokens):
            return None
        token = tokens[at]
        return NextToken(token=token, text=first.text_of(token), a=by_a.get(token), model=by_b.get(token))

    of_a, of_model = chosen(a.answer.tokens), chosen(b.answer.tokens)
    can_tie = is_greedy and a.prompt == b.prompt
    tie = _is_tie(of_a, of_model, by_a, by_b, NOISE[first.model.dtype]) if can_tie else None
    return Against(
        equal=False,
        parting=Parting(characters=characters, tokens=at, of_a=of_a, of_model=of_model, is_tie=tie),
    )


def _is_tie(
    of_a: NextToken | None,
    of_model: NextToken | None,
    by_a: dict[int, float],
    by_model: dict[int, float],
    noise: float,
) -> bool | None:
    """Whether both models might as well have chosen the other's token; None where that is not known."""
    if of_a is None or of_model is None or of_a.a is None or of_model.model is None:
        return None
    # A token that is not among the most probable ones is at most as probable as the last of these.
    lacking = of_model.a is None, of_a.model is None
    theirs = min(by_a.values()) if of_model.a is None else of_model.a
    ours = min(by_model.values()) if of_a.model is None else of_a.model
    found = is_tie((of_a.a, theirs), (ours, of_model.model), noise)
    return None if found and any(lacking) else found


def _is_greedy(settings: Settings) -> bool:
    """Whether the most probable token is always taken, so that log-probabilities say why."""
    sampling = settings.sampling
    return sampling.temperature == 0 and not sampling.penalizes and settings.num_beams == 1


def _shown(wanted: Wanted) -> str:
    if isinstance(wanted.prompt, Conversation):
        return str(wanted.prompt.messages[-1].get("content", "")) if wanted.prompt.messages else ""
    return str(wanted.prompt)
