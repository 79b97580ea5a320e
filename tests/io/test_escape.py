from __future__ import annotations

import sys
import unicodedata

import pytest

from weightops.io.escape import escape, is_harmless

SHOWN = [
    "a\u200cb",
    "\U0001f469\u200d\U0001f4bb",
    "\U0001fae9",
    "e\u0301",
    "\ufe0f",
    "模型",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
]


@pytest.mark.parametrize("text", SHOWN, ids=ascii)
def test_joiners_and_what_a_later_unicode_knows_are_shown(text: str) -> None:
    assert is_harmless(text)
    assert escape(text) == text


def test_what_acts_on_a_terminal_or_is_not_seen_is_not() -> None:
    bidirectional = [*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u061c", "\u200e", "\u200f"]
    nothing = [
        "\ufffe",
        "\U0010ffff",
        "\ufdd0",
        "\u2065",
        "\U000e0001",
        "\U000e0fff",
        "\ud800",
        "\ue000",
        "\u2028",
        "\u2029",
    ]
    for character in [
        *map(chr, range(32)),
        *map(chr, range(127, 160)),
        *bidirectional,
        *nothing,
        "\u2060",
        "\ufeff",
        "\u2028",
    ]:
        assert not is_harmless(f"é{character}")
        assert character not in escape(f"é{character}")


def test_only_joiners_of_the_format_characters_are_shown() -> None:
    formats = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == "Cf"]
    assert [c for c in formats if is_harmless(c)] == ["\u200c", "\u200d"]
