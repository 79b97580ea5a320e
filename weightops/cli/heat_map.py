"""Pages of HTML with heat maps of layers. They need no network and run no script."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from statistics import median

from weightops.io.escape import escape

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

Column = Mapping[int, float | None]
"""Values by number of the layer."""


def page(title: str, name: str, parts: Iterable[str]) -> bytes:
    """A page, in UTF-8, whose heading is `name`, made of pieces of HTML."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{text(title)}</title>'
    return "\n".join([head, f"<style>{_STYLE}</style><h1>{text(name)}</h1>", *parts, "</html>"]).encode()


def text(value: str) -> str:
    """Text from anywhere, as HTML."""
    return html.escape(escape(value))


def heat_map(title: str, columns: Mapping[str, Column]) -> str:
    """Layers down, modules across; a colour says by how much a value is above or below the median of its column."""
    middles = {name: median([v for v in column.values() if v] or [0.0]) for name, column in columns.items()}
    head = "".join(f"<th>{text(name)}" for name in columns)
    rows = (
        f"<tr><th>{number}" + "".join(_cell(column.get(number), middles[name]) for name, column in columns.items())
        for number in sorted({number for column in columns.values() for number in column})
    )
    caption = f"{text(title)}: red above the median of its column, blue below, full at {2**_FULL:g} times"
    table = f"<table><caption>{caption}</caption><thead><tr><th>{head}</thead>{''.join(rows)}</table>"
    return f'<h2>{text(title)}</h2><div class="map">{table}</div>'


def _cell(value: float | None, middle: float) -> str:
    if value is None:
        return "<td>"
    distance = math.log2(value / middle) / _FULL if value > 0 and middle > 0 else -1.0 if middle > 0 else 0.0
    strength = round(45 * min(1.0, abs(distance)))
    hue = 10 if distance > 0 else 215
    return f'<td style="background:hsl({hue} 85% {100 - strength}%)">{value:.3g}'
