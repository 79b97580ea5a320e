"""Fixtures of several commands' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_command import Say, make_models

from weightops.cli.main import run


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command line in a folder with the models base, a and b."""
    make_models(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(line.split())
        found = capsys.readouterr()
        return code, found.out, found.err

    return call
