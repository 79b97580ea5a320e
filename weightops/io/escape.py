"""Names from files, made harmless for a terminal."""

from __future__ import annotations

import unicodedata

_MAX_CHARS = 200


_JOINERS = "\u200c\u200d"
"""Zero-width non-joiner and joiner, without which Persian, Indic scripts and emoji are not what was written."""
_IGNORABLE = ("\u2065", *map(chr, range(0xFFF0, 0xFFF9)), *map(chr, range(0xE0000, 0xE1000)))
"""Where Unicode will put further characters that are not seen (Default_Ignorable_Code_Point)."""


def escape(text: str) -> str:
    """Show control, format, private and unpaired characters as escapes; shorten what is absurdly long.

    Covers C0 and C1 controls (terminal escapes), bidirectional overrides and line separators; not joiners, and not
    characters that only a later Unicode than Python's knows, such as new emoji.
    """
    if len(text) > _MAX_CHARS:
        text = f"{text[: _MAX_CHARS - 20]}...({len(text)} characters)"
    return text if is_harmless(text) else "".join(c if is_harmless(c) else _escaped(c) for c in text)


def is_harmless(text: str) -> bool:
    """Whether a terminal shows every character of `text` and does nothing else."""
    if text.isascii():
        return text.isprintable()
    return all(map(_is_shown, text))


def _is_shown(character: str) -> bool:
    category = unicodedata.category(character)
    if category == "Cn":
        is_noncharacter = ord(character) & 0xFFFE == 0xFFFE or "\ufdd0" <= character <= "\ufdef"
        return not is_noncharacter and character not in _IGNORABLE
    return category not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or character in _JOINERS


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
