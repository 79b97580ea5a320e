"""The page about comparing: its commands as they stand, on a small model and one that a LoRA was merged into."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, text

from weightops.cli.main import run
from weightops.operations.compare import KINDS

PAGE = Path(__file__).parents[1] / "docs/compare.md"


@pytest.fixture
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base", "llama")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    state = load_file(tmp_path / "tuned/model.safetensors")
    torch.manual_seed(0)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        state[name] += torch.randn(64, 4) @ torch.randn(4, 64) * 0.02
    save_file(state, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    (tmp_path / "heldout.txt").write_text(text(60))
    (tmp_path / "prompts.txt").write_text("the weights\nonce upon\n")


@pytest.mark.usefixtures("_models")
def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^    weightops (.*)$", PAGE.read_text(), re.MULTILINE)
    verbs = ("compare", "compare", "convert", "compare", "quantize", "compare", "compare")
    assert [command.split()[0] for command in commands] == [*verbs]
    shown = []
    for command in commands:
        assert run(shlex.split(command)) == 0, command
        shown.append(capsys.readouterr().out)
    told = re.search(r"^    (A is base.*?\.)\n\n", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert told is not None
    words = " ".join(told[1].split())
    assert re.sub(r"[\d.]+ %", "%", words) == re.sub(r"[\d.]+ %", "%", shown[0].splitlines()[0])
    assert Path("changes.html").stat().st_size > 5000
    assert [line.split()[0] for line in shown[5].splitlines()[1:3]] == ["tuned", "base-4bit"]
    assert shown[6].splitlines()[-1].startswith("    ")
    assert "Prompt 2: " in shown[6]


@pytest.mark.usefixtures("_models")
def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(block, {})
    assert "low-rank" in capsys.readouterr().out


def test_every_kind_is_explained() -> None:
    named = set(re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| `.*?\|", PAGE.read_text(), re.MULTILINE))))
    assert named == KINDS.keys() - {"not-numbers"}
