"""Colour where it helps: on a terminal that has it, unless the environment asks for none; never in documents."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from support import write_checkpoint

from weightops.cli.colour import is_wanted
from weightops.cli.main import run
from weightops.cli.output import table

VARIABLES = ("NO_COLOR", "FORCE_COLOR", "TERM")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "on_a_terminal", "elsewhere"),
    [
        ({}, True, False),
        ({"TERM": "xterm-256color"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
    ids=str,
)
def test_who_wants_colour_is_said_by_terminal_and_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], on_a_terminal: bool, elsewhere: bool
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (is_wanted(Terminal()), is_wanted(io.StringIO())) == (on_a_terminal, elsewhere)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    write_checkpoint(tmp_path / "model", {"a": torch.ones(4), "b": torch.full((4,), float("nan"))})
    assert run(["manifest", "model", "--quiet"]) == 0
    write_checkpoint(tmp_path / "broken", {"a": torch.ones(4)})
    (tmp_path / "broken" / "weightops-manifest.json").write_bytes(Path("model/weightops-manifest.json").read_bytes())
    return tmp_path


COLOURED = [
    ("verify model", 0, "\x1b[32mas model/weightops-manifest.json says\x1b[0m"),
    ("verify broken", 3, "model.safetensors: \x1b[31m\x1b[1mdiffers\x1b[0m"),
    ("verify broken", 3, "\x1b[31m\x1b[1mNOT as broken/weightops-manifest.json says\x1b[0m"),
    ("check model", 0, "\x1b[31m\x1b[1merror\x1b[0m"),
    ("inspect model", 0, "\x1b[1mfile               tensors  size\x1b[0m"),
    ("inspect nowhere", 10, "\x1b[31m\x1b[1mError:\x1b[0m nowhere: no such file or folder"),
    ("shard model --drop b --out out --dry-run", 0, "\x1b[33mWarning:\x1b[0m left out: b"),
]


@pytest.mark.parametrize(("line", "code", "shown"), COLOURED, ids=[line for line, _, _ in COLOURED])
def test_verdicts_errors_warnings_and_headings_are_coloured(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, code: int, shown: str
) -> None:
    assert run(line.split()) == code
    plain = capsys.readouterr()
    assert "\x1b" not in plain.out + plain.err
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(line.split()) == code
    coloured = capsys.readouterr()
    assert shown in coloured.out + coloured.err
    if "--dry-run" not in line and "verify" not in line:  # where times are told
        for one, other in ((plain.out, coloured.out), (plain.err, coloured.err)):
            assert one == click.unstyle(other)


def test_documents_are_never_coloured(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for line in ("verify broken --json", "check model --json", "inspect nowhere --json"):
        run(line.split())
        json.loads(capsys.readouterr().out)


def test_columns_are_aligned_by_what_is_seen() -> None:
    rows = [("a", "b"), ("\x1b[31mred\x1b[0m", "x"), ("plain", "yy")]
    assert table(rows, right=(1,), heads=False).splitlines() == ["a       b", "\x1b[31mred\x1b[0m     x", "plain  yy"]


@pytest.mark.parametrize(("variables", "coloured"), [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False)], ids=str)
def test_a_real_terminal_has_colour(models: Path, variables: dict[str, str], coloured: bool) -> None:
    ours, theirs = pytest.importorskip("pty").openpty()
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    command = [sys.executable, "-m", "weightops", "verify", "model", "--quick"]
    with subprocess.Popen(command, cwd=models, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            seen += piece
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[32mas " in seen) == coloured
