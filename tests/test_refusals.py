"""Requests that contradict themselves or ask for what does not exist: refused before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import write_checkpoint

import weightops
from weightops.cli.main import run
from weightops.errors import UsageError

BASE = {"a.weight": torch.ones(4, 4), "b": torch.zeros(3)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", BASE)
    write_checkpoint(tmp_path / "tuned", {name: tensor + 1 for name, tensor in BASE.items()})
    weightops.diff("base", "tuned", "delta")
    return tmp_path


FROM_PYTHON: dict[str, Callable[[], Any]] = {
    "unknown vocabulary policy 'guess'": lambda: weightops.recover("base", "tuned", "out", vocab="guess"),
    "an exact delta knows its tensors": lambda: weightops.recover("base", "delta", "out", drop="b"),
    "an exact delta is always safetensors": lambda: weightops.diff("base", "tuned", "out", format="torch"),
    "an exact delta has no dtype": lambda: weightops.diff("base", "tuned", "out", dtype="float16"),
    "unknown method 'divide'": lambda: weightops.diff("base", "tuned", "out", method="divide"),
    "nothing can be written there": lambda: weightops.shard("base", "hf://org/out"),
    "a shard size of '0B' holds nothing": lambda: weightops.shard("base", "out", max_shard_size="0B"),
    "unknown format 'zip'": lambda: weightops.shard("base", "out", format="zip"),
    "there is no model to evaluate": lambda: weightops.evaluate([], "base/config.json"),
    "the 0 most probable tokens are none": lambda: weightops.generate("base", "x", temperature=1, top_k=0),
    "a URL has no revision": lambda: weightops.download("http://127.0.0.1:9/x.bin", "out", revision="v1"),
    "names one revision, --revision another": lambda: weightops.download("org/model@v1", "out", revision="v2"),
}


@pytest.mark.parametrize("said", FROM_PYTHON)
def test_what_cannot_be_meant_is_refused(here: Path, said: str) -> None:
    before = sorted(here.iterdir())
    with pytest.raises(UsageError, match=said):
        FROM_PYTHON[said]()
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("convert base --to hf --set context_length --out out", "expected NAME=VALUE"),
        ("convert base --to hf --tokenizer base/config.json --no-tokenizer --out out", "give one of the two"),
    ],
)
def test_so_it_is_on_the_command_line(here: Path, capsys: pytest.CaptureFixture[str], command: str, said: str) -> None:
    assert run(command.split()) == 2
    assert said in capsys.readouterr().err
    assert not (here / "out").exists()


def test_names_that_the_package_does_not_have_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'weightops' has no attribute 'blend'"):
        weightops.blend  # noqa: B018
    assert {"merge_lora", "verify_merge", "evaluate", "run"} <= {*dir(weightops)}
