"""The page about adapters, as it stands: its commands, its recipe and its Python, on a small model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from adapter_sums import changes_of, distance, loaded, total
from adapters import LINEAR, llama, load_model, quietly, save_adapter, save_model, state
from peft import PeftModel
from safetensors.torch import save_file

from weightops.cli.main import run
from weightops.ops.lora.combined import METHODS

PAGE = Path(__file__).parents[1] / "docs/adapters.md"


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^    weightops (.*)", PAGE.read_text(), re.MULTILINE)]


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model", llama())
    save_adapter(tmp_path / "style", model, 1, target_modules=LINEAR, lora_alpha=0.3)
    save_adapter(tmp_path / "facts", model, 2, lora_alpha=0.2)
    with quietly():
        whole = PeftModel.from_pretrained(load_model(model), tmp_path / "style").state_dict()
    (tmp_path / "dump").mkdir()
    save_file({n: t.detach().clone() for n, t in whole.items()}, tmp_path / "dump/model.safetensors", {"format": "pt"})
    shutil.copy(model / "config.json", tmp_path / "dump")
    shutil.copy(tmp_path / "style/adapter_config.json", tmp_path / "dump")
    (tmp_path / "both.yml").write_text(block("yaml"))
    return tmp_path


def test_the_page_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown, warned = {}, {}
    for arguments in commands():
        assert run(arguments) == 0, arguments
        captured = capsys.readouterr()
        key = " ".join(arguments)
        shown[key], warned[key] = captured.out, captured.err
    assert {arguments[0] for arguments in commands()} == {"adapter", "merge-lora", "run"}
    exact = total([here / "style", here / "facts"], (0.75, -0.5))
    assert distance(changes_of(here / "both"), exact) < 1e-6
    made = [path for path in here.iterdir() if (path / "adapter_model.safetensors").exists()]
    peft = [path for path in made if path.name not in ("style-torchtune",)]
    assert {"both", "both-6", "linear", "ties", "style-2", "style-99", "style-16", "small"} <= {p.name for p in peft}
    loaded(here / "model", sorted(peft))
    assert re.search(
        r"\d+ modules, off by [\d.]+ % of the exact change", next(t for k, t in shown.items() if "linear" in k)
    )
    assert "svd of rank 4 + 4" in next(text for key, text in shown.items() if "svd --dry-run" in key)
    assert "makes and decomposes the whole product" in next(t for k, t in warned.items() if "ties_svd" in k)
    assert re.search(r"about \d[\d.]* % of them come back", next(t for k, t in warned.items() if "--weight -1" in k))
    assert not (here / "none").exists()
    assert json.loads((here / "small/adapter_config.json").read_text())["base_model_name_or_path"]
    trained, merged = state(here / "trained"), state(here / "merged")
    assert all((trained[name] == tensor).all() for name, tensor in merged.items())


def test_its_python_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("python"), {})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(changes_of(here / "sum"))
    assert all(re.fullmatch(r"model\.layers\.\S+: \d+\.\d % off", line) for line in said)


def test_the_table_has_every_method() -> None:
    rows = re.findall(r"^\| (`.*`) \| .* \| .* \|$", PAGE.read_text().partition("## Another rank")[0], re.MULTILINE)
    assert sorted(name.strip("`") for row in rows for name in row.split(", ")) == sorted(METHODS)
