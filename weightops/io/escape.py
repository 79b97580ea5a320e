"""Names from files, made harmless for a terminal."""

from __future__ import annotations

import unicodedata

_MAX_CHARS = 200


def escape(text: str) -> str:
    """Show control, format, private and unpaired characters as escapes; shorten what is absurdly long.

    Covers C0 and C1 controls (terminal escapes), bidirectional overrides and line separators.
    """
    if len(text) > _MAX_CHARS:
        text = f"{text[: _MAX_CHARS - 20]}...({len(text)} characters)"
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if not unicodedata.category(c).startswith(("C", "Zl", "Zp")) else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
