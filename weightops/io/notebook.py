"""Objects as a notebook shows them: a title, a few facts, and the first rows of a table, in the notebook's style."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence

from weightops.io.escape import escape

_ROWS = 20


def card(
    title: str,
    facts: Mapping[str, object],
    heads: Sequence[str] = (),
    rows: Collection[Sequence[object]] = (),
    *,
    what: str = "rows",
) -> str:
    """HTML for `_repr_html_`; facts that are None or empty are left out, and of `rows` all but the first 20."""
    said = " · ".join(
        f"{_text(name)} <b>{_text(value)}</b>" for name, value in facts.items() if value not in (None, "")
    )
    parts = [f"<p><b>{_text(title)}</b><br>{said}</p>"]
    if rows:
        body = "".join(_row("td", row) for row, _ in zip(rows, range(_ROWS), strict=False))
        parts.append(f"<table><thead>{_row('th', heads)}</thead><tbody>{body}</tbody></table>")
    if len(rows) > _ROWS:
        parts.append(f"<p>and {len(rows) - _ROWS:,} more {_text(what)}</p>")
    return "".join(parts)


def _row(tag: str, cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{tag} style=text-align:left>{_text(cell)}</{tag}>' for cell in cells)}</tr>"


def _text(value: object) -> str:
    """A value, harmless in a page; numbers with their thousands apart."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return html.escape(escape(f"{value:.6g}" if isinstance(value, float) else str(value)))


def in_units(nbytes: int) -> str:
    """Bytes in decimal units: `1.3 GB`."""
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if nbytes >= u), (1, "bytes"))
    return f"{nbytes / unit:.1f} {name}" if unit > 1 else f"{nbytes} {name}"
