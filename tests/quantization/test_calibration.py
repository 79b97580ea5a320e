"""Calibration data: what is read, which windows are drawn, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import save_tokenizer
from transformers import AutoTokenizer

from weightops.errors import CorruptInput, SourceMissing, UsageError, WeightopsError
from weightops.quantization.calibration import calibrate, read_documents, read_texts


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


LINES: dict[str, tuple[str, list[str]]] = {
    "separators of lines in strings": ('{"text": "1\u20282\u20293\x854"}\n"5"\n', ["1\u20282\u20293\x854", "5"]),
    "a mark at the beginning": ('\ufeff{"text": "one"}', ["one"]),
    "CRLF, blank lines": ('{"text": "one"}\r\n\r\n  \n"two"\r\n', ["one", "two"]),
    "parts": ('{"messages": [{"content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}]}', ["ab"]),
    "calls of tools": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": []}, '
        '{"role": "assistant"}, {"role": "tool", "content": "b"}]}',
        ["a\nb"],
    ),
    "ShareGPT": ('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}', ["a\nb"]),
    "nothing said": ('{"messages": [{"role": "user", "content": null}]}\n"one"', ["one"]),
}


@pytest.mark.parametrize("line", LINES)
def test_lines_as_people_have_them(tmp_path: Path, line: str) -> None:
    data, expected = LINES[line]
    (tmp_path / "a.jsonl").write_bytes(data.encode())
    found = read_texts([tmp_path / "a.jsonl"])
    assert found == expected


def test_text_files_lose_their_mark_and_have_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\u2028".encode())
    assert read_texts([tmp_path / "a.txt"]) == ["one\ntwo\nthree\u2028"]


def test_conversations_go_through_the_template_if_there_is_one(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": ["hi"]}, {"role": "assistant"}]
    given = [{"text": "x"}, "y", {"messages": turns}, {"conversations": [{"from": "gpt", "value": "z"}]}, "last"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, given)))
    documents = read_documents([tmp_path / "a.jsonl"])
    folder = tmp_path / "model"
    save_tokenizer(folder)
    plain = AutoTokenizer.from_pretrained(folder)
    whole = calibrate(plain, documents, 1, len(plain("x\n\ny\n\ns\nhi\n\nz\n\nlast").input_ids), 0)
    assert plain.decode(whole.tokens[0]) == "<s>x\n\ny\n\ns\nhi\n\nz\n\nlast"
    template = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    asking = "{% if add_generation_prompt %}!{% endif %}"
    save_tokenizer(folder, chat_template=template + asking)
    chat = AutoTokenizer.from_pretrained(folder)
    said = "<s>x\n\ny<s>system:s</s><s>user:hi</s><s>assistant:</s><s>assistant:z</s><s>last"
    length = len(chat(said, add_special_tokens=False).input_ids)
    assert chat.decode(calibrate(chat, documents, 1, length, 0).tokens[0]) == said
    save_tokenizer(folder, chat_template="{{ raise_exception('only users') }}")
    with pytest.raises(CorruptInput, match=r"a\.jsonl: line 3: the tokenizer's chat template fails: only users"):
        calibrate(AutoTokenizer.from_pretrained(folder), documents, 1, 5, 0)


@pytest.mark.parametrize(
    ("name", "data", "kind", "message"),
    [
        ("none.txt", None, SourceMissing, "No such file"),
        ("a.txt", b"\xff\xfe", CorruptInput, "not text in UTF-8"),
        ("a.txt", b" \n", UsageError, "no text to calibrate with"),
        ("a.jsonl", b'{"text": "x"}\n{', CorruptInput, "line 2: is not JSON"),
        ("a.jsonl", b'{"prompt": "x"}', CorruptInput, "line 1: has no text"),
        ("a.jsonl", b'{"text": "a\rb"}', CorruptInput, "line 1: is not JSON"),
        ("a.jsonl", b"[" * 100_000, CorruptInput, "line 1: is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', CorruptInput, "line 1: a string holds half of a surrogate pair"),
        ("a.jsonl", b'{"messages": ["x"]}', CorruptInput, "line 1: a message is str, expected an object"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 5}]}', CorruptInput, "message's content is int"),
        ("a.jsonl", b'{"messages": [{"role": 5, "content": "x"}]}', CorruptInput, "message's role is int"),
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
