"""JSON from strangers: what two parsers could read in two ways is refused, and what would take too much."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.errors import CorruptInput
from weightops.io import strict_json
from weightops.io.strict_json import dumps, load_object, loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_json_writes_is_read_as_json_reads_it(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert loads(text.encode(), "x") == json.loads(text)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1, "a": 1}', "x: the key 'a' occurs twice"),
        (b'[{"b": {"a": 1, "a": 2}}]', "x: the key 'a' occurs twice"),
        (b"NaN", "x: NaN is not JSON"),
        (b"[-Infinity]", "x: -Infinity is not JSON"),
        (b'"\xff"', "x: not UTF-8 at byte 1"),
        (b"[" * 100_000, "x: JSON nested too deeply"),
        (b"{} {}", r"x: not JSON at character 3 \(Extra data\)"),
        (b"", "x: not JSON at character 0"),
        (b"1" * 5000, "x: JSON holds a number of too many digits"),
        (b'"\\ud800"', "x: a string holds half of a surrogate pair"),
        (b'{"\\udfff": 1}', "x: a string holds half of a surrogate pair"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(CorruptInput, match=said):
        loads(data, "x")


def test_constants_are_read_where_they_may_stand() -> None:
    assert loads(b"[Infinity, -Infinity]", "x", constants=True) == [float("inf"), float("-inf")]


def test_no_document_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_BYTES", 5)
    assert loads(b"[1,2]", "x") == [1, 2]
    with pytest.raises(CorruptInput, match="x: JSON of 6 bytes, at most 5 are read"):
        loads(b"[1, 2]", "x")


def test_the_top_level_may_have_to_be_an_object() -> None:
    assert load_object(b'{"a": Infinity}', "x", constants=True) == {"a": float("inf")}
    with pytest.raises(CorruptInput, match="x: expected a JSON object, found list"):
        load_object(b"[]", "x")


def test_what_is_written_is_the_same_on_every_run() -> None:
    assert dumps({"b": "é", "a": 1}) == '{\n  "a": 1,\n  "b": "é"\n}\n'.encode()
    assert dumps({"b": "é"}, ascii_only=True) == b'{\n  "b": "\\u00e9"\n}\n'
