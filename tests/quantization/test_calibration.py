"""Calibration data: what is read, which windows are drawn, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightops.errors import CorruptInput, SourceMissing, UsageError, WeightopsError
from weightops.quantization.calibration import calibrate, read_texts


def letters(text: str, **_: Any) -> Any:
    """A tokenizer of bytes."""
    return SimpleNamespace(input_ids=torch.tensor([list(text.encode())]))


def test_documents_come_from_text_and_from_every_kind_of_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    lines = [json.dumps(line) for line in ("plain", {"text": "t"}, {"content": "c"}, {"messages": turns})]
    (tmp_path / "b.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    found = read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert found == ["one\n\ntwo\n", "plain", "t", "c", "hi\nyes"]


@pytest.mark.parametrize(
    ("name", "data", "kind", "message"),
    [
        ("none.txt", None, SourceMissing, "No such file"),
        ("a.txt", b"\xff\xfe", CorruptInput, "not text in UTF-8"),
        ("a.txt", b" \n", UsageError, "no text to calibrate with"),
        ("a.jsonl", b'{"text": "x"}\n{', CorruptInput, "line 2: is not JSON"),
        ("a.jsonl", b'{"prompt": "x"}', CorruptInput, "line 1: has no text"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, data: bytes | None, kind: type[WeightopsError], message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(kind, match=message):
        read_texts([tmp_path / name])


def test_windows_are_of_the_text_apart_from_each_other_and_the_seed_s_choice() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    first, again, other = (calibrate(letters, [text], 5, 40, seed) for seed in (0, 0, 1))
    assert first.tokens.shape == (5, 40)
    assert first.digest == again.digest != other.digest
    assert first.warnings == ()
    starts = [(text.encode().find(bytes(window.tolist()))) for window in first.tokens]
    assert min(starts) >= 0
    everything = calibrate(letters, [text], 10**6, 40, 0)
    assert len(everything.tokens) == 25
    assert "makes 25 samples" in everything.warnings[0]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="has 10 tokens, one sample is to have 11"):
        calibrate(letters, ["abcdefghij"], 1, 11, 0)
