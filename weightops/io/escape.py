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
    return text if is_harmless(text) else "".join(c if is_harmless(c) else _escaped(c) for c in text)


def is_harmless(text: str) -> bool:
    """Whether a terminal shows every character of `text` and does nothing else."""
    if text.isascii():
        return text.isprintable()
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
