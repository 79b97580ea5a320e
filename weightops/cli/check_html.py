"""A page of what check found: findings, and heat maps of the layers. It needs no network and runs no script."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping

from weightops.cli.heat_map import heat_map
from weightops.cli.heat_map import page as heat_page
from weightops.operations.check_layers import NUMBERED
from weightops.operations.check_report import CheckReport
from weightops.ops.statistics import TensorStatistics

_MAX_LAYERS = 1000

_Measure = Callable[[TensorStatistics], float | None]
_MEASURES: Mapping[str, _Measure] = {
    "standard deviation": lambda found: found.std,
    "greatest magnitude": lambda found: found.absmax,
}


def page(report: CheckReport) -> bytes:
    """The page, in UTF-8."""
    counts = ", ".join(f"{n} {severity}" + "s" * (n != 1) for severity, n in report.counts.items() if n)
    parts = [
        f"<p>{len(report.tensors)} tensors, {report.nbytes:,} bytes: {counts or 'nothing found'}</p>",
        _findings(report),
        *(_map(title, measure, stack) for stack in _stacks(report).values() for title, measure in _MEASURES.items()),
    ]
    return heat_page(f"weightops check: {report.name}", report.name, parts)


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
    return heat_map(
        title, {suffix: {n: measure(found) for n, found in column.items()} for suffix, column in stack.items()}
    )
