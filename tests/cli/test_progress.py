"""What progress shows: bars on a terminal, a line for each file elsewhere, events for programs."""

from __future__ import annotations

import io
import json
import sys

import pytest

from weightops.cli import progress
from weightops.cli.progress import BarProgress, EventProgress, human


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(shown: BarProgress | EventProgress) -> None:
    """A resumed file and a new one."""
    shown.start("writing", 3000)
    shown.start_file("\x1b[2J" + "long" * 20 + "-2", 2000, 1000)
    shown.advance(1000, "\x1b[2J" + "long" * 20 + "-2")
    shown.finish_file("\x1b[2J" + "long" * 20 + "-2", 2000, False)
    shown.finish_file("kept", 1000, True)
    shown.note("a note")


def test_bars_count_what_was_there_without_taking_it_for_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    shown = BarProgress(False)
    follow(shown)
    whole = shown._bar
    assert (whole.n, whole.initial, whole.last_print_n, whole.total) == (2000, 1000, 1000, 3000)
    assert whole.postfix == "1.0 kB resumed"
    assert shown._files == {}
    shown.stop()
    shown.stop()
    text = screen.getvalue()
    assert "\x1b[2J" not in text
    assert "long-2" in text
    assert "kept kept (1.0 kB)" in text
    assert "a note" in text


@pytest.mark.parametrize("quiet", [False, True])
def test_a_line_for_each_file_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    shown = BarProgress(quiet)
    follow(shown)
    shown.stop()
    name = "\\x1b[2J" + "long" * 20 + "-2"
    lines = ["" if quiet else f"wrote {name} (2.0 kB)\nkept kept (1.0 kB)\na note\n"]
    assert capsys.readouterr().err == lines[0]


def test_events_are_documents_and_bytes_come_once_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s[0])
    shown = EventProgress()
    follow(shown)
    shown.advance(1)
    now_s[0] += 1
    shown.advance(1)
    shown.stop()
    shown.stop()
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {event["schema"] for event in events} == {"weightops-event/1"}
    kinds = ["start", "file", "progress", "done", "done", "note", "progress", "stop"]
    assert [event["event"] for event in events] == kinds
    assert [event["nbytes"] for event in events if event["event"] in ("progress", "stop")] == [2000, 2002, 2002]
    assert (events[0]["total_nbytes"], events[1]["resumed_nbytes"], events[4]["kept"]) == (3000, 1000, True)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (5e6, "5.0 MB"), (2e9, "2.0 GB")],
)
def test_bytes_are_told_in_decimal_units(nbytes: float, text: str) -> None:
    assert human(nbytes) == text
    assert human(nbytes * 1e12 + 1e12).endswith("TB")
