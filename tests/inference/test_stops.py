"""Stop strings, over all ways to cut many texts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from weightops.errors import UsageError
from weightops.inference.stops import StopStrings


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first, looked for letter by letter."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))]
    return text


def test_all_splits_of_many_texts() -> None:
    chance = random.Random(1)
    for _ in range(1000):
        text = "".join(chance.choices("ab世", k=chance.randint(0, 7)))
        stops = ["".join(chance.choices("ab世", k=chance.randint(1, 4))) for _ in range(chance.randint(1, 3))]
        expected = cut(text, stops)
        for cuts in itertools.product([False, True], repeat=max(0, len(text) - 1)):
            pieces, piece = [], ""
            for character, ends in itertools.zip_longest(text, cuts, fillvalue=True):
                piece += str(character) if character is not True else ""
                if ends:
                    pieces.append(piece)
                    piece = ""
            found = StopStrings(stops)
            said = ""
            for part in pieces:
                said += found.push(part)
                assert expected.startswith(said)
            said += found.end()
            assert said == expected, (text, stops, pieces)
            assert (found.found is not None) == (expected != text)


def test_only_what_a_stop_string_may_begin_with_is_held_back() -> None:
    found = StopStrings(["\n\nUser:", "###"])
    assert found.push("Hello.\n") == "Hello."
    assert found.push("\nUs") == ""
    assert found.push("ually #") == "\n\nUsually "
    assert found.end() == "#"


def test_an_empty_one_is_refused() -> None:
    with pytest.raises(UsageError, match="a stop string is empty"):
        StopStrings([""])
