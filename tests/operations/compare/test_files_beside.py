"""Settings, tokenizers and chat templates: what differs is named, and what changes nothing is told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import write_checkpoint
from tiny_models import save_tokenizer

from weightops.formats.folder import open_checkpoint
from weightops.operations.compare import Comparison, compare

CONFIG: dict[str, Any] = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "sliding_window": None, "torch_dtype": "float16"}
Documents = dict[str, Any]


@pytest.fixture
def beside(tmp_path: Path) -> Callable[..., Comparison]:
    """Compare a model of one tensor with itself, after an edit of a JSON file beside it."""

    def run(edit: Callable[[Documents], None], name: str = "config.json", **options: Any) -> Comparison:
        for side in "ab":
            shutil.rmtree(tmp_path / side, ignore_errors=True)
            write_checkpoint(tmp_path / side, {"model.norm.weight": torch.ones(4)}, CONFIG)
            save_tokenizer(tmp_path / side)
        document = json.loads((tmp_path / "b" / name).read_text())
        edit(document)
        (tmp_path / "b" / name).write_text(json.dumps(document))
        return compare(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"), **options)

    return run


def changes(found: Comparison) -> list[tuple[str, str | None, str | None, bool]]:
    return [(each.pointer, each.a, each.b, each.changes_results) for each in found.config]


def test_settings_are_told_by_pointer_and_by_what_they_do(beside: Callable[..., Comparison]) -> None:
    def edit(config: Documents) -> None:
        config |= {"rope_theta": 5e5, "transformers_version": "9", "sliding_window": 4096, "torch_dtype": "bfloat16"}
        config |= {"a/b": {"c~d": [1]}, "pad_token_id": None}

    found = beside(edit)
    assert changes(found) == [
        ("/rope_theta", "10000", "500000", True),
        ("/sliding_window", "null", "4096", True),
        ("/transformers_version", None, '"9"', False),
        ("/a~1b", None, '{"c~d": [1]}', True),
        ("/pad_token_id", None, "null", False),
    ]
    (finding,) = [each for each in found.findings if each.code == "config"]
    assert "/rope_theta 10000 → 500000" in finding.text
    assert "transformers_version" not in finding.text


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_theta": 10000, "rope_scaling": None},
        {"rope_theta": 10000, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_both_dialects_of_rotary_settings_are_one(beside: Callable[..., Comparison], rope: Documents) -> None:
    def edit(config: Documents) -> None:
        del config["rope_theta"]
        config |= rope

    assert changes(beside(edit)) == []


def test_strict_counts_what_changes_results(beside: Callable[..., Comparison]) -> None:
    def harmless(config: Documents) -> None:
        config["use_cache"] = True

    def grave(config: Documents) -> None:
        config["rms_norm_eps"] = 1e-6

    def template(config: Documents) -> None:
        config["chat_template"] = "{{ messages }}"

    assert beside(harmless, tolerance=0, strict=True).differs is False
    assert beside(grave, tolerance=0, strict=True).differs is True
    assert beside(grave, tolerance=0).differs is False
    assert beside(template, "tokenizer_config.json", tolerance=0, strict=True).differs is True


def test_a_config_that_cannot_be_read_is_a_note(beside: Callable[..., Comparison], tmp_path: Path) -> None:
    beside(lambda config: None)
    (tmp_path / "b/generation_config.json").write_text('{"a": 1, "a": 2}')
    found = compare(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"))
    assert any("generation_config.json is not compared" in note and "occurs twice" in note for note in found.notes)


def parts(found: Comparison) -> dict[str, str]:
    return {each.part: each.text for each in found.tokenizer}


def test_tokens_added_moved_and_merged_otherwise(beside: Callable[..., Comparison]) -> None:
    def edit(document: Documents) -> None:
        vocabulary = document["model"]["vocab"]
        vocabulary["G"], vocabulary["H"] = vocabulary["H"], vocabulary["G"]
        vocabulary["\u0120new"] = 320
        document["model"]["merges"].reverse()
        document["normalizer"] = {"type": "NFC"}
        document["added_tokens"].append({**document["added_tokens"][0], "id": 321, "content": "<|im_end|>"})

    found = parts(beside(edit, "tokenizer.json"))
    assert found["vocabulary"].startswith("2 tokens are in B alone: ' new' (320), '<|im_end|>' (321)")
    assert found["ids"].startswith("2 tokens with another id: 'G' 40 → 41, 'H' 41 → 40")
    assert found["merges"].endswith("they are the same in another order")
    assert "normaliser" in found["normalizer"]


def test_special_tokens_and_settings(beside: Callable[..., Comparison]) -> None:
    def config(document: Documents) -> None:
        document |= {"eos_token": "<|im_end|>", "add_bos_token": False}

    found = beside(config, "tokenizer_config.json")
    assert [each.text for each in found.tokenizer] == [
        'eos_token is "</s>" in A and "<|im_end|>" in B',
        "add_bos_token is not set in A and false in B",
    ]

    def json_(document: Documents) -> None:
        document["added_tokens"][1]["special"] = False

    assert parts(beside(json_, "tokenizer.json")) == {"special tokens": "special in one of the two alone: '</s>'"}


def test_chat_templates_are_compared_line_by_line(beside: Callable[..., Comparison], tmp_path: Path) -> None:
    def edit(document: Documents) -> None:
        document["chat_template"] = "a\nb\nc"

    (change,) = beside(edit, "tokenizer_config.json").tokenizer
    assert change.text == "the template 'default' is in B alone"
    (tmp_path / "a/chat_template.jinja").write_text("a\nx\nc")
    (change,) = compare(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")).tokenizer
    assert change.text == "the template 'default' differs"
    assert [line for line in change.diff if line[0] in "+-"] == ["--- A", "+++ B", "-x", "+b"]


def test_a_tokenizer_that_cannot_be_read_is_a_note(beside: Callable[..., Comparison], tmp_path: Path) -> None:
    beside(lambda config: None)
    (tmp_path / "b/tokenizer.json").write_text("[]")
    found = compare(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"))
    assert any(note.startswith("B's tokenizer is not compared") for note in found.notes)
    (tmp_path / "b/tokenizer.json").unlink()
    found = compare(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"))
    assert "the tokenizers are not compared: B has none" in found.notes


def test_long_templates_are_not_compared_line_by_line(beside: Callable[..., Comparison], tmp_path: Path) -> None:
    beside(lambda config: None)
    for side in "ab":
        (tmp_path / side / "chat_template.jinja").write_text("".join(f"{side}{i}\n" for i in range(100_000)))
    (change,) = compare(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")).tokenizer
    assert (change.text, change.diff) == ("the template 'default' differs", ())
