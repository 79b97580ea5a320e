"""Heat maps of layers, as HTML: layers down, modules across, numbers in the cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from weightops.cli.pages.html import dotted, long_text, scrolled, text
from weightops.io.escape import escape

_STEPS = 4
"""Steps of colour to either side of the middle."""
_NARROW = 12
"""Characters that fit in a column without making it wider."""
_MINUS = "\N{MINUS SIGN}"
_MARK = "\N{DAGGER}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A value, or None where nothing was measured; `note` says what else is to be known, and marks the cell."""

    value: float | None
    note: str = ""


Column = Mapping[int, Cell]
"""Cells by number of the layer; there is none where a layer has no such module."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What colours say: how many times `middle` a value is; without one, the median of its column.

    `step` is the power of two between one colour and the next; `of` names the middle in the legend. `is_amount`: values
    are amounts from zero on, of which `middle` is the largest; zero has the colour of the middle, and red says much.
    """

    of: str = "the median of its column"
    middle: float | None = None
    step: float = 0.5
    is_amount: bool = False

    def colour(self, value: float, middle: float) -> str:
        """The class of a cell, `n4` to `p4`, or `odd` for what is not finite."""
        if not math.isfinite(value):
            return "odd"
        if self.is_amount:
            steps = _STEPS + round(math.log2(value / middle) / self.step) if value > 0 and middle > 0 else 0
            return f"p{max(1, min(_STEPS, steps))}" if value > 0 else "m"
        if value <= 0 or middle <= 0:
            return "m" if value == middle else "n4" if value < middle else "p4"
        steps = round(math.log2(value / middle) / self.step)
        steps = max(-_STEPS, min(_STEPS, steps))
        return f"{'n' if steps < 0 else 'p'}{abs(steps)}" if steps else "m"


def heat_map(
    title: str,
    columns: Mapping[str, Column],
    scale: Scale,
    *,
    unit: str = "",
    show: Callable[[float], str] = "{:.3g}".format,
    row: str = "layer",
    marked: str = "",
) -> str:
    """A heat map under a heading and a legend.

    `show` writes a value, without its `unit`; `row` is what a number on the left is of; `marked` explains the dagger
    of cells with a note.
    """
    middles = {name: _middle(column, scale) for name, column in columns.items()}
    numbers = sorted({number for column in columns.values() for number in column})
    head = "".join(f'<th scope="col">{_column_head(name)}</th>' for name in columns)
    lines = [f'<tr><th scope="col">{text(row)}</th>{head}</tr>']
    if scale.middle is None:
        cells = "".join(f"<td>{show(middle)}</td>" if middle else "<td></td>" for middle in middles.values())
        lines.append(f'<tr class="middle"><th scope="row">median</th>{cells}</tr>')
    rows = []
    for number in numbers:
        cells = "".join(
            _cell(column.get(number), f"{row} {number}, {escape(name)}", middles[name], scale, show, unit)
            for name, column in columns.items()
        )
        rows.append(f'<tr><th scope="row">{number}</th>{cells}</tr>')
    caption = f"<caption>{text(row)}s down, modules across{text(f', in {unit}' if unit else '')}</caption>"
    table = f'<table class="map">{caption}<thead>{"".join(lines)}</thead><tbody>{"".join(rows)}</tbody></table>'
    legend = _legend(columns, numbers, scale, row, marked)
    return f"<section><h2>{text(title)}</h2>{legend}{scrolled(title, table)}</section>"


def _middle(column: Column, scale: Scale) -> float:
    if scale.middle is not None:
        return scale.middle
    return median([cell.value for cell in column.values() if cell.value and math.isfinite(cell.value)] or [0.0])


def _cell(cell: Cell | None, place: str, middle: float, scale: Scale, show: Callable[[float], str], unit: str) -> str:
    if cell is None:
        return "<td></td>"
    mark = f"{_MARK} " if cell.note else ""
    note = f"; {cell.note}" if cell.note else ""
    if cell.value is None:
        return f'<td class="none" title="{long_text(f"{place}: not measured{note}")}">{mark}{_MINUS}</td>'
    shown = show(cell.value)
    said = f"{shown} {unit}".rstrip()
    if middle == 1 and not unit:
        said += f" times {scale.of}"
    elif middle > 0 and math.isfinite(cell.value):
        said += f", {cell.value / middle:.2g} times {scale.of}"
    return (
        f'<td class="{scale.colour(cell.value, middle)}" title="{long_text(f"{place}: {said}{note}")}">'
        f"{mark}{text(shown)}</td>"
    )


def _legend(columns: Mapping[str, Column], numbers: list[int], scale: Scale, row: str, marked: str) -> str:
    """What colours say, and of the other kinds of cells those that there are."""
    least, most = (1 - _STEPS, 0) if scale.is_amount else (-_STEPS, _STEPS)
    strip = ['<li class="m">0</li>'] if scale.is_amount else []
    for steps in range(least, most + 1):
        times = 2 ** (steps * scale.step)
        is_end = steps == most and not scale.is_amount
        end = "\N{LESS-THAN OR EQUAL TO}" if steps == least else "\N{GREATER-THAN OR EQUAL TO}" * is_end
        strip.append(f'<li class="{scale.colour(times, 1.0)}">{end}{times:.2g}</li>')
    cells = [cell for column in columns.values() for cell in column.values()]
    others = []
    if any(cell.value is None for cell in cells):
        others.append(f'<span class="none">{_MINUS}</span> not measured')
    if any(cell.value is not None and not math.isfinite(cell.value) for cell in cells):
        others.append('<span class="odd">nan</span> not a finite number')
    if any(number not in column for column in columns.values() for number in numbers):
        others.append(f"blank: the {text(row)} has no such module")
    if any(cell.note for cell in cells):
        others.append(f"{_MARK} {text(marked)}")
    return (
        f'<div class="legend">Colour: times {text(scale.of)}<ul class="strip">{"".join(strip)}</ul>'
        f"{'; '.join(others)}</div>"
    )


def _column_head(name: str) -> str:
    """A name in lines, so that its column is narrow: a line for each part, and long parts broken where they may be."""
    return ".<br>".join(text(part) if len(part) <= _NARROW else dotted(part) for part in escape(name).split("."))
