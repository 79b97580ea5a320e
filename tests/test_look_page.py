"""The page about looking inside: its commands run, its examples are what they print, its pictures the screen."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import screens
from adapters import llama, save_adapter, save_model

from weightops.cli.browse.app import Browser
from weightops.cli.main import run

PAGE = Path(__file__).parents[1] / "docs/look.md"
TINY = Path(__file__).parent / "data" / "tiny-llama"


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^    weightops (.*)", PAGE.read_text(), re.MULTILINE)]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "model")
    shutil.copytree(TINY, "tuned")
    save_model(tmp_path / "base", llama(num_hidden_layers=1))
    save_adapter(tmp_path / "lora", tmp_path / "base")
    tree, adapter = re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found = commands()
    assert [arguments[0] for arguments in found] == [*["inspect"] * 4, *["browse"] * 2]
    printed = []
    for arguments in found:
        assert run(arguments) == (2 if arguments[0] == "browse" else 0), arguments  # for it is no terminal here
        printed.append(capsys.readouterr().out)
    assert tree in printed[0]
    told = [line.split()[:2] for line in printed[3].splitlines()]
    for line in adapter.splitlines():
        if line and not line.startswith(("trained on", "norm, rank")):
            assert line.split()[:2] in told, line


def test_keys_are_those_of_the_screen() -> None:
    rows = re.findall(r"^\| ((?:`.*?`|q).*?) \|", PAGE.read_text()[PAGE.read_text().index("| key |") :], re.MULTILINE)
    said = {key for row in rows for key in re.findall(r"`(.*?)`", row)}
    names = {getattr(binding, "key", "") for binding in Browser.BINDINGS}
    assert {"/", "n", "N", "c", "m", "t", "q"} <= said
    assert {{"/": "slash"}.get(key, key) for key in said if len(key) == 1} <= names


def test_pictures_are_what_the_screen_shows() -> None:
    for path, picture in screens.screens().items():
        kept = path.read_text(encoding="utf-8")
        assert screens.texts(kept) == screens.texts(picture), "run `python docs/screens.py`"
        assert "http" not in re.sub(r"http://www.w3.org/\S*|<!--.*?-->", "", kept)
        assert len(kept) < 150_000
