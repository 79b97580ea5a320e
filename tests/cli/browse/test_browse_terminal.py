"""`weightops browse` in a real terminal: what it leaves behind, and what it says where there is none."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest
from terminals import needs_terminals, run_in_terminal

from weightops.cli.main import run

pytest.importorskip("textual")
TINY = Path(__file__).parents[2] / "data" / "tiny-llama"
LEFT = ("\x1b[?1049l", "\x1b[?25h", "\x1b[?1000l", "\x1b[?2004l")
"""The screen as before, a cursor, no mouse, and no brackets around what is pasted."""


@needs_terminals
@pytest.mark.parametrize(
    ("columns", "sent", "code"),
    [
        (160, "q", 0),
        pytest.param(160, "\x03", 0, marks=pytest.mark.slow),
        pytest.param(80, signal.SIGINT, 130, marks=pytest.mark.slow),
        (80, signal.SIGTERM, 143),
    ],
)
def test_the_terminal_is_left_as_it_was(columns: int, sent: str | int, code: int) -> None:
    shown = run_in_terminal(["browse", str(TINY)], columns, 24, steps=[("38 tensors", sent)])
    assert shown.code == code
    assert shown.echoes
    for control in LEFT:
        assert control in shown.raw[shown.raw.rindex("\x1b[?1049h") :]
    assert "Traceback" not in shown.text


@needs_terminals
def test_no_colour_where_none_is_wanted() -> None:
    def colours(env: dict[str, str]) -> set[str]:
        shown = run_in_terminal(["browse", str(TINY)], 80, 24, steps=[("38 tensors", "q")], env=env)
        return set(re.findall(r"[34]8;5;(\d+)|[34]8;2;[\d;]+", shown.raw))

    greys = {str(number) for number in range(232, 256)}
    assert colours({"NO_COLOR": "1"}) <= greys
    assert not colours({}) <= greys


def test_without_a_terminal_it_is_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["browse", str(TINY)]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == (
        "Error: browse needs a terminal, and this is none\nHint: `weightops inspect --tree` prints what there is\n"
    )


def test_without_the_extra_it_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "textual", None)
    assert run(["browse", str(TINY)]) == 2
    assert capfd.readouterr().err == (
        "Error: browse needs the textual package, which is not installed\nHint: pip install 'weightops[tui]'\n"
    )


@needs_terminals
def test_what_cannot_be_opened_never_takes_the_screen() -> None:
    shown = run_in_terminal(["browse", "nowhere"], 80, 24)
    assert shown.code == 10
    assert "\x1b[?1049h" not in shown.raw
    assert "nowhere: no such file or folder" in shown.text
