"""The page about quantising, as it stands, on small models: its own commands, and those in the place of TigerBot's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny, text

from weightops.cli.main import run

PAGE = Path(__file__).parents[1] / "docs/quantize.md"


def commands(heading: str) -> list[list[str]]:
    part = PAGE.read_text().partition(f"{heading}\n")[2].partition("\n## ")[0]
    return [shlex.split(line) for line in re.findall(r"^    weightops (.*)", part, re.MULTILINE)]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_tigerbot_s_two_command_lines_run_on_a_small_bloom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tigerbot-7b", "bloom", hidden_size=128)
    for name in ("wikitext2.txt", "heldout.txt"):
        (tmp_path / name).write_text(text(200))
    quantize, generate, evaluate = commands("## TigerBot's two command lines")
    assert run(quantize) == 0
    shards = tmp_path / "tigerbot-4bit"
    shards.mkdir()
    stored = sorted(load_file(tmp_path / "tigerbot-7b-4bit/model.safetensors").items())
    for i, part in enumerate((stored[::2], stored[1::2])):
        torch.save(dict(part), shards / f"tigerbot-4bit-128g-{i}.pt")
    for path in (tmp_path / "tigerbot-7b").glob("*.json"):
        (shards / path.name).write_bytes(path.read_bytes())
    capsys.readouterr()
    assert run(generate) == 0
    said = capsys.readouterr().out
    generate[1] = "./tigerbot-7b-4bit"
    assert run(generate) == 0
    assert capsys.readouterr().out == said != ""
    assert run(evaluate) == 0


@pytest.mark.usefixtures("one_thread")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", "llama", hidden_size=128, intermediate_size=256, max_position_embeddings=2048)
    for name in ("text.txt", "heldout.txt"):
        (tmp_path / name).write_text(text(200))
    found = commands("# Quantising a model")
    assert [words[0] for words in found] == ["quantize", "quantize", "check", "eval", "generate", "dequantize"]
    for words in found:
        assert run(words) == 0, words
