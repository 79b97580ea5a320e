"""A page of what check found: findings, and heat maps of the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from weightops.cli.meter import human
from weightops.cli.pages import html as html_page
from weightops.cli.pages.heat_map import Cell, Scale, heat_map
from weightops.cli.pages.html import long_text
from weightops.formats.modules import NUMBERED
from weightops.operations.check import CheckReport
from weightops.ops.measures.statistics import TensorStatistics

_MAX_LAYERS = 1000

_Measure = Callable[[TensorStatistics], float | None]
_MEASURES: Mapping[str, _Measure] = {
    "standard deviation": lambda found: found.std,
    "greatest magnitude": lambda found: found.absmax,
}


def page(report: CheckReport) -> bytes:
    """The page, in UTF-8."""
    parts = [html_page.facts(_facts(report)), _findings(report)]
    stacks = _stacks(report)
    if stacks and any(tensor.statistics and not tensor.spec.dtype.is_float for tensor in report.tensors.values()):
        parts.append('<p class="faint">Tensors of integers, such as packed weights, are not in the maps.</p>')
    for stack, columns in stacks.items():
        maps = (_map(f"{stack}: {title}", measure, columns) for title, measure in _MEASURES.items())
        parts.append(html_page.side_by_side(maps))
    return html_page.page("weightops check", report.name, parts)


def _facts(report: CheckReport) -> dict[str, str]:
    counts = ", ".join(f"{n} {severity}" + "s" * (n != 1) for severity, n in report.counts.items() if n)
    dtypes = Counter(tensor.spec.dtype.value for tensor in report.tensors.values())
    found = {
        "found": counts or "nothing",
        "tensors": f"{len(report.tensors):,}",
        "size": f"{human(report.nbytes)} ({report.nbytes:,} bytes)",
        "dtypes": ", ".join(f"{name} ({n})" for name, n in dtypes.most_common()),
        "values": "all read" if report.examined else "not read",
        "architecture": report.held_against or f"held against none: {report.not_held}",
    }
    if report.ignored_count:
        found["ignored"] = f"{report.ignored_count} ({', '.join(report.ignored)})"
    return {name: value for name, value in found.items() if value}


def _findings(report: CheckReport) -> str:
    rows = [
        f'<tr class="{f.severity}"><td>{f.severity}</td><td>{f.code}</td><td>{long_text(f.message)}'
        + (f'<div class="hint">{long_text(f.hint)}</div>' if f.hint else "")
        + "</td></tr>"
        for f in report.findings
    ]
    if not rows:
        return ""
    table = html_page.listing(("severity", "code", "what was found"), rows)
    return f"<h2>Findings</h2>{html_page.scrolled('findings', table)}"


_Stack = dict[str, dict[int, TensorStatistics]]
"""A stack of layers: for each module the statistics by number of the layer."""


def _stacks(report: CheckReport) -> dict[str, _Stack]:
    """Every stack of layers, by what stands before the number, its matrices and vectors of floats as columns."""
    stacks: dict[str, _Stack] = {}
    for name, tensor in report.tensors.items():
        matched = NUMBERED.fullmatch(name)
        if matched and tensor.statistics and tensor.spec.dtype.is_float and int(matched[2]) < _MAX_LAYERS:
            module = stacks.setdefault(matched[1], {}).setdefault(matched[3], {})
            module[int(matched[2])] = tensor.statistics
    return {prefix: stack for prefix, stack in stacks.items() if max(map(len, stack.values())) > 1}


def _map(title: str, measure: _Measure, stack: _Stack) -> str:
    columns = {
        suffix: {n: Cell(measure(found), _note(found)) for n, found in column.items()}
        for suffix, column in stack.items()
    }
    return heat_map(title, columns, Scale(), marked="holds NaN or infinities, left out of the number")


def _note(found: TensorStatistics) -> str:
    counts = {"NaN": found.nan, "infinite": found.infinite}
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n)
