"""A page of what compare found: the sentence, what to see first, maps of the layers, and lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from weightops.api import Comparisons
from weightops.cli.comparison import candidate_heads, candidate_rows, changed_row, listed_heads, listed_rows
from weightops.cli.divergence import quoted
from weightops.cli.pages import html as html_page
from weightops.cli.pages.answers import answers
from weightops.cli.pages.heat_map import Cell, Scale, heat_map
from weightops.cli.pages.html import long_text, text
from weightops.formats.modules import NUMBERED
from weightops.inference.evaluate import Score
from weightops.operations.compare import KINDS, Comparison, TensorChange

_MAX_LAYERS = 1000
_MAX_LISTED = 500
_GRAVE = ("not-finite", "no-partner", "shape", "moved")


def page(found: Comparisons) -> bytes:
    """The page, in UTF-8."""
    first = found.comparisons[0]
    if len(found.comparisons) == 1:
        return html_page.page("weightops compare", f"{first.b} against {first.a}", [*_parts(first), *_outputs(found)])
    rows = [_row(cells) for cells in candidate_rows(found)]
    parts = [html_page.scrolled("models", html_page.listing(candidate_heads(found), rows))]
    for each in found.comparisons:
        parts += [f"<h2>{text(each.b)}</h2>", *_parts(each)]
    title = f"{len(found.comparisons)} models against {first.a}"
    return html_page.page("weightops compare", title, [*parts, *_outputs(found)])


def _row(cells: Sequence[str]) -> str:
    numbers = "".join(f'<td class="number">{text(cell)}</td>' for cell in cells[1:])
    return f'<tr><th scope="row">{html_page.dotted(cells[0])}</th>{numbers}</tr>'


def _parts(found: Comparison) -> list[str]:
    parts = [f'<p class="lead">{long_text(found.relation)}</p>', html_page.facts(_facts(found)), _findings(found)]
    parts += _maps(found)
    parts += [_changed(found), _lone(found), _config(found), _tokenizer(found)]
    parts += [f'<p class="faint">{long_text(note)}</p>' for note in found.notes]
    return [part for part in parts if part]


def _facts(found: Comparison) -> dict[str, str]:
    changed = len(found.changed)
    facts = {
        "tensors": f"{len(found.tensors):,}",
        "equal": f"{len(found.tensors) - changed:,}",
        "changed": f"{changed:,}",
        "without a partner": f"{len(found.unpaired):,}" if found.unpaired else "",
        "‖B-A‖/‖A‖": "" if found.relative is None else f"{100 * found.relative:.3g} %",
        "1 - cosine": "" if found.angle is None else f"{found.angle:.3g}",
        "tolerance": "" if found.differs is None else "exceeded" if found.differs else "kept",
    }
    return {name: value for name, value in facts.items() if value}


def _findings(found: Comparison) -> str:
    rows = [
        f'<tr class="{"error" if f.code in _GRAVE else ""}"><td>{text(f.code)}</td><td>{long_text(f.text)}</td></tr>'
        for f in found.findings
    ]
    if not rows:
        return ""
    return f"<h2>What to see first</h2>{html_page.scrolled('findings', html_page.listing(('what', 'where'), rows))}"


def _maps(found: Comparison) -> list[str]:
    """Every stack of layers with more than one, as the change of each module."""
    stacks: dict[str, dict[str, dict[int, Cell]]] = {}
    cells = {tensor.name: _cell(tensor) for tensor in found.tensors}
    cells |= {each.name: Cell(None, "it has no partner") for each in found.unpaired}
    for name, cell in cells.items():
        matched = NUMBERED.fullmatch(name)
        if matched and int(matched[2]) < _MAX_LAYERS:
            stacks.setdefault(matched[1], {}).setdefault(matched[3], {})[int(matched[2])] = cell
    stacks = {name: stack for name, stack in stacks.items() if max(map(len, stack.values())) > 1}
    largest = max((t.relative or 0.0 for t in found.tensors), default=0.0)
    if not found.changed:
        return []
    scale = Scale("the largest change", middle=100 * largest, step=2.0, is_amount=True)
    return [
        heat_map(
            f"{name}: ‖B-A‖/‖A‖",
            stack,
            scale,
            unit="%",
            show=lambda value: f"{value:.3g}" if value else "=",
            marked="more to know: point at it, or see the lists",
        )
        for name, stack in stacks.items()
    ]


def _cell(tensor: TensorChange) -> Cell:
    is_odd = tensor.kind == "not-finite" or tensor.a.nan != tensor.b.nan
    value = math.nan if is_odd else None if tensor.relative is None else 100 * tensor.relative
    is_plain = tensor.kind in ("identical", "equal", "broad", "cast", "cast-of-b", "quantised")
    return Cell(value, "" if is_plain else KINDS[tensor.kind])


def _changed(found: Comparison) -> str:
    changed = found.changed
    if not changed:
        return ""
    heads = ("tensor", "kind", "‖B-A‖/‖A‖", "1 - cosine", "max |d|", "changed", "signs", "where")
    rows = []
    for tensor in changed[:_MAX_LISTED]:
        name, kind, *numbers = changed_row(tensor)
        cells = "".join(f'<td class="number">{text(number)}</td>' for number in numbers)
        rows.append(
            f'<tr><th scope="row">{html_page.dotted(name)}</th><td>{text(kind)}</td>{cells}'
            f"<td>{long_text(_where(tensor))}</td></tr>"
        )
    more = len(changed) - len(rows)
    rest = f'<p class="faint">and {more} more (--json has all)</p>' if more else ""
    meanings = "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items() if kind in {t.kind for t in changed})
    table = html_page.scrolled("changed tensors", html_page.listing(heads, rows))
    said = f'<h2>Changed tensors, most first</h2><p class="faint">{long_text(meanings)}.</p>'
    return f'{said}<div class="wide">{table}</div>{rest}'


def _where(tensor: TensorChange) -> str:
    parts = []
    if tensor.heads:
        parts.append(f"heads {listed_heads(tensor)}")
    if tensor.rows:
        parts.append(f"{tensor.changed_rows} of {tensor.n_rows} rows: {listed_rows(tensor)}")
    if tensor.moved_from:
        parts.append(f"holds A's {tensor.moved_from}")
    if tensor.largest is not None:
        parts.append(f"max at {list(tensor.largest.at)}: {tensor.largest.a:.5g} → {tensor.largest.b:.5g}")
    if tensor.b.nan or tensor.a.nan:
        parts.append(f"NaN: {tensor.a.nan} → {tensor.b.nan}")
    return "; ".join(parts)


def _lone(found: Comparison) -> str:
    rows = [
        f"<tr><td>{'both' if each.where == 'both' else each.where.upper()}</td><td>{html_page.dotted(each.name)}</td>"
        f"<td>{text(each.dtype.value)} {list(each.shape)}</td><td>{long_text(each.reason)}</td></tr>"
        for each in found.unpaired[:_MAX_LISTED]
    ]
    if not rows:
        return ""
    table = html_page.scrolled("without a partner", html_page.listing(("in", "tensor", "what", "why"), rows))
    return f"<h2>Without a partner</h2>{table}"


def _config(found: Comparison) -> str:
    rows = [
        f"<tr><td>{text(each.file)}</td><td>{text(each.pointer)}</td><td>{long_text(each.a or 'absent')}</td>"
        f"<td>{long_text(each.b or 'absent')}</td><td>{'changes results' if each.changes_results else ''}</td></tr>"
        for each in sorted(found.config, key=lambda change: not change.changes_results)
    ]
    if not rows:
        return ""
    table = html_page.scrolled("settings", html_page.listing(("file", "setting", "A", "B", ""), rows))
    return f'<h2>Settings</h2><div class="brief">{table}</div>'


def _tokenizer(found: Comparison) -> str:
    parts = []
    for each in found.tokenizer:
        parts.append(f"<p><b>{text(each.part)}</b>: {long_text(each.text)}</p>")
        if each.diff:
            parts.append(html_page.scrolled(each.part, f"<pre>{''.join(map(_line, each.diff))}</pre>"))
    return f"<h2>Tokenizer and template</h2>{''.join(parts)}" if parts else ""


def _line(line: str) -> str:
    kind = {"+": "plus", "-": "minus"}.get(line[:1], "")
    return f'<span class="{kind}">{long_text(line)}</span>\n' if kind else f"{long_text(line)}\n"


def _outputs(found: Comparisons) -> list[str]:
    said = [] if found.answers is None else answers(found.answers)
    if found.outputs is None:
        return said
    reference, *scores = found.outputs.scores
    parts = ["<h2>What they make of the text</h2>", f'<p class="faint">{text(found.outputs.convention)}</p>']
    for score in scores:
        parts += _of_text(score, reference)
    return [*parts, *said]


def _of_text(score: Score, reference: Score) -> Iterable[str]:
    assert score.agreement is not None
    found = score.agreement.divergence
    yield html_page.facts(
        {
            "model": score.name,
            "perplexity": f"{score.perplexity:.4f} (of A {reference.perplexity:.4f})",
            "mean KL divergence": f"{found.kl.mean:.5g} ± {found.kl.error:.2g}",
            "99 % of positions below": f"{found.kl.percentiles['99']:.3g}",
            "max": f"{found.kl.max:.3g}",
            "RMS Δp": f"{100 * found.probability_rms.value:.3g} %",
            "same top token": f"{100 * found.top1.value:.2f} ± {100 * found.top1.error:.2f} %",
        }
    )
    rows = []
    for each in found.worst:
        texts = (each.context, each.expected or "", each.of_reference.text, each.of_model.text)
        cells = "".join(f"<td>{long_text(quoted(piece))}</td>" for piece in texts)
        rows.append(f'<tr><td class="number">{each.index}</td><td class="number">{each.kl:.3g}</td>{cells}</tr>')
    if rows:
        heads = ("token", "KL", "after", "the text has", "A's choice", "B's choice")
        table = html_page.scrolled("where they part", html_page.listing(heads, rows))
        yield f'<h2>Where they part most</h2><div class="brief">{table}</div>'
