"""What models answer to the same prompts as a part of a page: a column for each, with a mark where they part."""

from __future__ import annotations

import re

from weightops.cli.answers import agreed_heads, agreed_row, ending, parting_text
from weightops.cli.pages import html as html_page
from weightops.cli.pages.html import long_text, text
from weightops.inference.answers import AnswersReport, PromptAnswers

_MAX_LISTED = 500
_FIRST = re.compile(r"\s*(?:\w+|\S)?")
"""What is marked: a word, or a sign, with the space before it."""


def answers(found: AnswersReport) -> list[str]:
    """The section: how often they agree, and the answers."""
    rows = []
    for each in found.agreed:
        name, *cells = agreed_row(each)
        numbers = "".join(f'<td class="number">{text(cell)}</td>' for cell in cells)
        rows.append(f'<tr><th scope="row">{html_page.dotted(name)}</th>{numbers}</tr>')
    table = html_page.scrolled("how often they agree", html_page.listing(agreed_heads(found), rows))
    parts = ["<h2>What they answer</h2>", table]
    parts += [_prompt(each, found.models) for each in found.prompts[:_MAX_LISTED]]
    more = len(found.prompts) - _MAX_LISTED
    return [*parts, f'<p class="faint">and {more} more prompts (--json has all)</p>'] if more > 0 else parts


def _prompt(found: PromptAnswers, models: tuple[str, ...]) -> str:
    places = [None if each.parting is None else each.parting.characters for each in found.against]
    first = min((place for place in places if place is not None), default=None)
    columns = []
    for number, (model, answer) in enumerate(zip(models, found.answers, strict=True)):
        place = places[number - 1] if number else first
        parting = parting_text(found.against[number - 1]) if number else ""
        columns.append(
            f'<section><h4>{html_page.dotted(model)}</h4><p class="said">{_marked(answer.text, place)}</p>'
            f'<p class="faint">{long_text(ending(answer))}. {long_text(parting)}</p></section>'
        )
    head = f'<h3>Prompt {found.index + 1}</h3><p class="said">{long_text(found.prompt)}</p>'
    return f'{head}<div class="answers">{"".join(columns)}</div>'


def _marked(answer: str, place: int | None) -> str:
    """An answer, with a mark on what comes first after it has parted from the other."""
    if place is None:
        return long_text(answer)
    rest = answer[place:]
    matched = _FIRST.match(rest)
    end = matched.end() if matched else 0
    mark = long_text(rest[:end]) or '<span title="it ends here">∎</span>'
    return f'<span class="hint">{long_text(answer[:place])}</span><mark>{mark}</mark>{long_text(rest[end:])}'
