"""What the system refuses is a sentence with an exit code of the table, never a bug of ours."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from support import write_checkpoint

from weightops.cli.main import EXIT_CODES, run

LONG = "x" * 300


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model", {"a": torch.ones(2)})
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "text.txt").write_text("some text")
    for name, source in (("long", f"./{LONG}"), ("nobody", "~nobody-of-this-name/x"), ("below", "./file/x")):
        (tmp_path / f"{name}.yaml").write_text(f"sources: {{x: {source}}}\noutputs: {{./out: {{from: x}}}}\n")
    (tmp_path / "out.yaml").write_text(f"sources: {{x: ./model}}\noutputs: {{./{LONG}: {{from: x}}}}\n")
    return tmp_path


COMMANDS = [
    f"shard model --out {LONG}",
    "shard model --out file/out",
    "shard model --out loop/out",
    "shard model --out loop",
    "shard model --out /proc/out",
    "shard model --out .",
    "shard model --out /",
    "shard model --out ''",
    f"shard {LONG} --out out",
    "shard file/x --out out",
    "shard loop --out out",
    f"inspect {LONG}",
    "inspect loop",
    "inspect file",
    "inspect /dev/null",
    f"verify {LONG}",
    "verify file",
    f"verify model --manifest {LONG}",
    "verify model --manifest loop",
    f"manifest {LONG}",
    "manifest file",
    "manifest loop",
    f"check {LONG}",
    "check file",
    "check model --html file/x.html",
    "check model --html loop/x.html",
    f"check model --html {LONG}",
    f"run {LONG}",
    "run loop",
    "run file",
    "run long.yaml",
    "run nobody.yaml",
    "run below.yaml",
    "run out.yaml",
    f"quantize model --method rtn --out {LONG}",
    "quantize model --method rtn --out file/out",
    f"quantize model --calibration {LONG} --out out",
    "quantize model --calibration loop --out out",
    f"eval model --text {LONG}",
    "eval model --text loop",
    f"generate {LONG} --prompt x",
    f"download http://127.0.0.1:9/x.bin --deadline 1 --out {LONG}",
    "download http://127.0.0.1:9/x.bin --deadline 1 --out file/out",
    "download file --out out",
    f"merge-lora --base model --adapter {LONG} --out out",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_paths_are_told_in_a_sentence(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    words = ["" if word == "''" else word for word in command.split()]
    code = run([*words, "--quiet"])
    said = capsys.readouterr().err
    assert code in EXIT_CODES
    assert code != 0
    assert said.startswith("Error: ")
    assert "unexpected" not in said
    assert "bug" not in said
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, 16, "the disk is full"),
        (errno.EDQUOT, 16, "the disk is full"),
        (errno.EACCES, 1, "permission denied"),
        (errno.EIO, 1, "input/output error"),
        (errno.ENOENT, 10, "no such file or directory"),
        (errno.EMFILE, 1, "too many open files"),
    ],
)
def test_an_error_of_the_system_that_nobody_expected(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int, words: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("weightops.api.prove.find_place", fail)
    assert run(["inspect", "model", "--json"]) == code
    captured = capsys.readouterr()
    assert f"some/file: {words}" in captured.err
    assert json.loads(captured.out)["exit_code"] == code
