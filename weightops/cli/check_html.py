"""A page of what check found: findings, and heat maps of the layers. It needs no network and runs no script."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping
from statistics import median

from weightops.io.escape import escape
from weightops.operations.check_layers import NUMBERED
from weightops.operations.check_report import CheckReport
from weightops.ops.statistics import TensorStatistics

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 80em; color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; } td, th { padding: .2em .6em; text-align: left; vertical-align: top; }
.error td:first-child { color: #b3261e; } .warning td:first-child { color: #8a5a00; } .hint, caption { color: #5f5f5f; }
.map { overflow-x: auto; } .map td { min-width: 4.2em; text-align: right; font-variant-numeric: tabular-nums; }
.map th { font-weight: normal; white-space: nowrap; } .map thead th { writing-mode: vertical-rl; }
.map table { font-size: 12px; } caption { text-align: left; padding-bottom: .5em; }
"""
_FULL = 2.0
"""Powers of two from the median at which a colour is at its strongest."""
_MAX_LAYERS = 1000

_Measure = Callable[[TensorStatistics], float | None]
_MEASURES: Mapping[str, _Measure] = {
    "standard deviation": lambda found: found.std,
    "greatest magnitude": lambda found: found.absmax,
}


def page(report: CheckReport) -> bytes:
    """The page, in UTF-8."""
    name = _text(report.name)
    counts = ", ".join(f"{n} {severity}" + "s" * (n != 1) for severity, n in report.counts.items() if n)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>weightops check: {name}</title>',
        f"<style>{_STYLE}</style><h1>{name}</h1>",
        f"<p>{len(report.tensors)} tensors, {report.nbytes:,} bytes: {counts or 'nothing found'}</p>",
        _findings(report),
        *(_map(title, measure, stack) for stack in _stacks(report).values() for title, measure in _MEASURES.items()),
    ]
    return "\n".join([*parts, "</html>"]).encode()


def _text(text: str) -> str:
    return html.escape(escape(text))


def _findings(report: CheckReport) -> str:
    rows = (
        f'<tr class="{f.severity}"><td>{f.severity}<td>{f.code}<td>{html.escape(f.message)}'
        + (f'<div class="hint">{html.escape(f.hint)}</div>' if f.hint else "")
        for f in report.findings
    )
    return f"<table>{''.join(rows)}</table>" if report.findings else ""


_Stack = dict[str, dict[int, TensorStatistics]]
"""A stack of layers: for each module the statistics by number of the layer."""


def _stacks(report: CheckReport) -> dict[str, _Stack]:
    """Every stack of layers, by what stands before the number, its matrices and vectors as columns."""
    stacks: dict[str, _Stack] = {}
    for name, tensor in report.tensors.items():
        matched = NUMBERED.fullmatch(name)
        if matched and tensor.statistics is not None and int(matched[2]) < _MAX_LAYERS:
            module = stacks.setdefault(matched[1], {}).setdefault(matched[3], {})
            module[int(matched[2])] = tensor.statistics
    return {prefix: stack for prefix, stack in stacks.items() if max(map(len, stack.values())) > 1}


def _map(title: str, measure: _Measure, stack: _Stack) -> str:
    """Layers down, modules across; a colour says by how much a value is above or below the median of its column."""
    values = {suffix: {n: measure(found) for n, found in column.items()} for suffix, column in stack.items()}
    middles = {suffix: median([v for v in column.values() if v] or [0.0]) for suffix, column in values.items()}
    head = "".join(f"<th>{_text(suffix)}" for suffix in values)
    rows = (
        f"<tr><th>{number}" + "".join(_cell(column.get(number), middles[s]) for s, column in values.items())
        for number in sorted({number for column in values.values() for number in column})
    )
    caption = f"{title}: red above the median of its column, blue below, full at {2**_FULL:g} times"
    table = f"<table><caption>{caption}</caption><thead><tr><th>{head}</thead>{''.join(rows)}</table>"
    return f'<h2>{title}</h2><div class="map">{table}</div>'


def _cell(value: float | None, middle: float) -> str:
    if value is None:
        return "<td>"
    distance = math.log2(value / middle) / _FULL if value > 0 and middle > 0 else -1.0 if middle > 0 else 0.0
    strength = round(45 * min(1.0, abs(distance)))
    hue = 10 if distance > 0 else 215
    return f'<td style="background:hsl({hue} 85% {100 - strength}%)">{value:.3g}'
