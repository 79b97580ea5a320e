"""What models answer to the same prompts, as lines of text: the common beginning once, then where they part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.cli.colour import styled
from weightops.cli.divergence import quoted
from weightops.cli.output import escape_lines, table
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.inference.answers import Against, Agreed, Answer, AnswersReport, PromptAnswers

_SHOWN = 20


def answers_text(found: AnswersReport) -> str:
    """The summary, and the answers to the first prompts."""
    rows = [agreed_heads(found), *map(agreed_row, found.agreed)]
    parts = [table(rows, right=range(1, len(rows[0])))]
    parts += [_prompt(each, found.models) for each in found.prompts[:_SHOWN]]
    more = len(found.prompts) - _SHOWN
    if more > 0:
        parts.append(f"and {more} more prompts (--json and --html have all)")
    return "\n\n".join(parts)


def agreed_heads(found: AnswersReport) -> tuple[str, ...]:
    """What is said of each model's answers, by column."""
    return (f"answers against {escape(found.models[0])}", "prompts", "equal", "ties", "equal tokens (median)")


def agreed_row(found: Agreed) -> tuple[str, ...]:
    """How far a model's answers are those of A."""
    place = "" if found.median_tokens is None else f"{found.median_tokens:g}"
    return (escape(found.model), str(found.prompts), str(found.equal), str(found.ties), place)


def ending(answer: Answer) -> str:
    """How an answer ended, and how long it is; or why there is none."""
    if answer.error:
        return f"no answer: {answer.error.error}: {answer.error.message}"
    return f"{answer.finish}, {len(answer.tokens)} tokens"


def parting_text(found: Against) -> str:
    """Where an answer leaves that of A, in a sentence; empty where it does not."""
    if found.equal is None:
        return ""
    if found.parting is None:
        return "The same text as A's."
    parting = found.parting
    if parting.tokens is None:
        return f"It parts from A after {parting.characters} equal characters; the vocabularies differ."
    said = []
    for who, each in (("A", parting.of_a), ("it", parting.of_model)):
        if each is None:
            said.append(f"{who} has ended")
        else:
            said.append(
                f"{who} has {quoted(each.text)} (log-probability {_logprob(each.a)} to A, {_logprob(each.model)} to it)"
            )
    tie = "; a tie, closer than the arithmetic's noise" if parting.is_tie else ""
    return f"It parts from A after {parting.tokens} equal tokens: {', '.join(said)}{tie}."


def _logprob(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _prompt(found: PromptAnswers, models: tuple[str, ...]) -> str:
    lines = [f"{styled(f'Prompt {found.index + 1}', 'heading')}: {_indented(found.prompt)}"]
    common = found.common
    if common:
        lines.append(f"  {styled('all', 'heading')}: {_indented(common)}")
    for number, (model, answer) in enumerate(zip(models, found.answers, strict=True)):
        rest = answer.text[len(common) :]
        said = f"{'…' if common and rest else ''}{_indented(rest)} " if rest else ""
        lines.append(f"  {styled(escape(model), 'heading')}: {said}({escape_lines(ending(answer))})")
        if number and (parting := parting_text(found.against[number - 1])):
            lines.append(f"    {parting}")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return escape_lines(text).replace("\n", "\n    ")
