"""Warnings of libraries, of versions that no test has seen: not for those who run the program."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from weightops.cli.commands import env
from weightops.cli.main import run

PROGRAM = """
import logging, warnings
from weightops.cli.commands import env
from weightops.cli.main import main

def command(**options):
    warnings.warn("past_key_values are going away", FutureWarning)
    logging.getLogger("library").warning("this model is of another version")
    logging.getLogger("library").error("this is broken")

env.command.callback = command
main(["env"])
"""


@pytest.mark.parametrize(
    ("options", "variables", "shown"),
    [
        ([], {}, {"broken"}),
        ([], {"WEIGHTOPS_DEBUG": "1"}, {"past_key_values", "another version", "broken"}),
        (["-W", "default"], {}, {"past_key_values", "broken"}),
    ],
)
def test_warnings_of_libraries_are_shown_only_to_who_asks(
    options: list[str], variables: dict[str, str], shown: set[str]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS",)} | variables
    done = subprocess.run(
        [sys.executable, *options, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    said = ("past_key_values", "another version", "broken")
    assert {words for words in said if words in done.stderr} == shown
    assert shown != {"broken"} or done.stderr == "this is broken\n"


def test_in_tests_they_are_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(env.command, "callback", lambda **options: warnings.warn("old", FutureWarning, stacklevel=1))
    assert run(["env"]) == 1
    assert "unexpected FutureWarning: old" in capsys.readouterr().err
