"""Manual pages are those of the commands, are right troff, and are installed where `man` looks."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import man
import pytest

from weightops.cli.main import COMMANDS, LINES, run

ROOT = Path(__file__).parent.parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "docs" / "man").iterdir()}


def test_the_pages_are_those_of_the_commands() -> None:
    assert man.render() == PAGES, "run `python docs/generate.py`"
    assert {path.name for path in PAGES} == {
        "weightops.1",
        *(f"weightops-{name}.1" for name in COMMANDS),
        *(f"{man.page_of(line)}.1" for line in LINES),
    }


def shown(path: Path) -> str:
    command = ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=1000n", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("path", sorted(PAGES), ids=lambda path: path.stem)
def test_a_page_is_right_troff_and_says_what_help_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = path.stem.removeprefix("weightops").removeprefix("-")
    words = next((line.split() for line in LINES if man.page_of(line) == path.stem), [name] if name else [])
    assert run([*words, "--help"]) == 0
    helped = capsys.readouterr().out
    text = shown(path)
    for option in set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", helped, re.MULTILINE)):
        assert option in text
    for line in re.findall(r"^ {4}(weightops \S.*)$", helped, re.MULTILINE):
        assert line.rstrip("\\").strip() in text or not name  # to the letter, as people copy it
    for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"):
        assert f"\n{title}\n" in text
    if not name:
        assert all(f"weightops-{command}(1)" in text for command in COMMANDS)


def test_the_wheel_brings_them() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["shared-data"] == {"docs/man": "share/man/man1"}
