"""The Makefile's own logic: which Python it takes, and what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(MAKEFILE, folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    # Not those of a make that these tests may run under.
    ours = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment = ours | {"PATH": f"{folder}/bin{os.pathsep}{os.defpath}"}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("too_old", "chosen"),
    [([], "python3.11"), (["python3.11"], "python3.12"), (["python3.11", "python3.12", "python3.13"], "python3")],
)
def test_it_takes_the_first_python_that_is_new_enough(too_old: list[str], chosen: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        code = 1 if name in too_old else 0
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    assert f"\n{chosen} -m venv .venv\n" in make(tmp_path, "--dry-run", "setup").stdout


@pytest.mark.parametrize(("python", "shown"), [("", "nothing on the PATH"), ("false", "false")])
def test_without_a_python_it_says_so_in_a_sentence(python: str, shown: str, tmp_path: Path) -> None:
    done = make(tmp_path, "setup", f"PYTHON={python}")
    assert done.returncode != 0
    hint = "name one, as in make PYTHON=/path/to/python3"
    assert done.stdout == f"weightops needs Python 3.11 or newer, and {shown} is none: {hint}\n"
    assert not (tmp_path / ".venv").exists()


def test_help_lists_every_target_that_is_for_people() -> None:
    text = MAKEFILE.read_text()
    phony = text.partition(".PHONY: ")[2].partition("\n\n")[0].replace("\\", "").split()
    listed = re.findall(r'^\t@echo "make ([\w-]+)', text, re.MULTILINE)
    assert set(phony) - set(listed) == {"help", "setup", "lint", "format", "clean"}
