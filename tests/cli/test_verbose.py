"""--verbose says what is done with which files and how long it takes, and with errors which versions were at work."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub
from support import write_checkpoint

import weightops
from weightops.cli.main import run
from weightops.version import __version__

LINE = re.compile(r" *\d+\.\d\d s  (.*)")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_checkpoint(tmp_path / "model", {"a\x1b[2J": torch.ones(4), "b": torch.zeros(4)}, shards=2)


def details(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said with the time before it."""
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    return [found[1] for line in shown.splitlines() if (found := LINE.fullmatch(line))]


def test_what_is_done_with_which_files_is_said_as_it_is_done(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cast", "model", "--dtype", "float16", "--out", "out", "--verbose"]) == 0
    found = details(capsys)
    for words in (
        r"opened model as source: 2 tensors in model-00001-of-00002\.safetensors \(\d+ bytes\), model-00002",
        r"cast of source, dtype float16: 2 tensors",
        r"out: 1 weight files of \d+ bytes, beside them config\.json; plan [0-9a-f]{12}",
        r"writing model\.safetensors: 2 tensors from model-00001-of-00002\.safetensors, model-00002",
        r"writing took \d+\.\d s: \d+ B",
        r".*out is complete, and has its name",
    ):
        assert [line for line in found if re.match(words, line)], words
    assert run(["cast", "model", "--dtype", "float16", "--out", "again"]) == 0
    assert details(capsys) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("verify model -v --progress none", r"comparing model with model/weightops-manifest\.json: \d files"),
        ("check model -v --progress json", "checking took"),
        ("manifest model --overwrite -v", "hashing took"),
    ],
)
def test_other_commands_say_what_they_do(
    model: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    assert run(["manifest", "model", "--quiet"]) == 0
    assert run(line.split()) == 0
    shown = capsys.readouterr().err
    texts = [json.loads(each).get("text", "") if each.startswith("{") else each for each in shown.splitlines()]
    assert [text for text in texts if re.search(words, text)]


def test_downloads_say_what_they_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Hub() as hub:
        hub.add("org/name", {"a.bin": b"x" * 100, "config.json": b"{}"})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert run(["download", "org/name", "--out", str(tmp_path / "out"), "-v"]) == 0
    found = details(capsys)
    assert "hf://org/name: 2 files, 102 bytes; 0 are here" in found
    assert "fetching a.bin: 100 bytes, of which 0 are here" in found


def test_an_error_is_said_with_the_versions_at_work(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, has in (("check nowhere -v", True), ("check nowhere", False), ("check -v --nonsense", True)):
        assert run(line.split()) in (2, 10)
        shown = capsys.readouterr().err
        assert shown.startswith("Error: ")
        assert (re.search(rf"^weightops +{re.escape(__version__)}$", shown, re.MULTILINE) is not None) == has
        assert ("system " in shown) == has


def test_more_and_less_at_once_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "model", "-v", "-q"]) == 2
    assert "--verbose says more and --quiet less" in capsys.readouterr().err


def test_python_gets_the_same_from_the_log(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "weightops"):
        weightops.shard(model, "out")
    assert any(message.startswith("opened") and "model" in message for message in caplog.messages)
    level = logging.getLogger("weightops").level
    assert run(["check", "model", "-v"]) == 0
    assert (logging.getLogger("weightops").level, logging.getLogger("weightops").handlers) == (level, [])


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_is_a_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([option]) == 0
    assert capsys.readouterr().out == f"weightops {__version__}\n"


def test_the_program_itself_says_it(model: Path) -> None:
    line = [sys.executable, "-m", "weightops", "shard", "model", "--out", "out", "--verbose"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "opened model as source: 2 tensors" in done.stderr
