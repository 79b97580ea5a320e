"""What progress shows: bars on a terminal, a line for each file elsewhere, events for programs."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import json_schemas
import jsonschema
import pytest
import torch
from support import write_checkpoint

from weightops.cli import events
from weightops.cli.events import EventProgress
from weightops.cli.main import run
from weightops.cli.meter import Meter, duration, human
from weightops.cli.progress import BarProgress, LineProgress, how_far, make_progress
from weightops.engine.control import Progress, Silent

NAME = "\x1b[2J" + "long" * 20 + "-2"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def follow(shown: Progress) -> None:
    """A file that was half there, and one that an earlier run had finished."""
    shown.start("writing", 3000)
    shown.start_file(NAME, 2000, 1000)
    shown.advance(1000, NAME)
    shown.finish_file(NAME, 2000, False)
    shown.advance(1000)
    shown.finish_file("kept", 1000, True)
    shown.note("a note")


def test_bars_count_what_was_there_without_taking_it_for_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    shown = BarProgress()
    follow(shown)
    whole = shown._bar
    assert (whole.n, whole.initial, whole.last_print_n, whole.total) == (3000, 1000, 1000, 3000)
    assert whole.postfix == "1.0 kB resumed"
    assert shown._files == {}
    shown.stop()
    shown.stop()
    text = screen.getvalue()
    assert "\x1b[2J" not in text
    assert "long-2" in text
    assert "kept kept (1.0 kB)" in text
    assert "a note" in text


def test_a_line_for_each_file_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = LineProgress()
    follow(shown)
    shown.stop()
    name = "\\x1b[2J" + "long" * 20 + "-2"
    assert capsys.readouterr().err == f"wrote {name} (2.0 kB)\nkept kept (1.0 kB)\na note\n"


def test_lines_tell_of_life_while_nothing_moves(capsys: pytest.CaptureFixture[str]) -> None:
    beats = threading.Semaphore(0)

    class Watched(LineProgress):
        def tell(self) -> None:
            super().tell()
            beats.release()

    shown = Watched(interval_s=0.001)
    shown.start("downloading", 0)
    assert all(beats.acquire(timeout=30) for _ in range(2))
    shown.stop()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert {line.partition(", ")[0] for line in lines} == {"downloading: 0 B"}


def test_how_far_it_is_is_said_with_the_rate_of_the_last_minute() -> None:
    clock = Clock()
    meter = Meter("writing", 8_000_000, clock)
    assert how_far(meter) == "writing: 0 %, 0 B of 8.0 MB"
    meter.begin_file("half", 2_000_000)
    for _ in range(100):
        clock.now_s += 1
        meter.add(10_000)
    assert how_far(meter) == "writing: 37 %, 3.0 MB of 8.0 MB, 10.0 kB/s, 8 min left"
    meter.add(1_000_000)
    meter.finish_file("kept", 1_000_000, True)
    assert how_far(meter) == "writing: 50 %, 4.0 MB of 8.0 MB, 10.0 kB/s, 7 min left"
    clock.now_s += 61
    meter.add(0)
    clock.now_s += 60
    meter.add(0)
    assert how_far(meter) == "writing: 50 %, 4.0 MB of 8.0 MB, 0 B/s"
    assert (meter.nbytes_per_s, meter.eta_s, meter.elapsed_s) == (0.0, None, 221.0)


def test_a_size_that_nobody_knows_has_no_end() -> None:
    clock = Clock()
    meter = Meter("downloading", 0, clock)
    clock.now_s += 2
    meter.add(3000)
    assert how_far(meter) == "downloading: 3.0 kB, 1.5 kB/s"


def test_events_are_documents_and_bytes_come_once_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(events.time, "monotonic", clock)
    shown = EventProgress()
    shown.note("before")
    follow(shown)
    shown.advance(1)
    clock.now_s += 1
    shown.advance(1)
    shown.stop()
    shown.stop()
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    schema = json_schemas.schemas()["weightops-progress/1"]
    for event in found:
        jsonschema.validate(event, schema, jsonschema.Draft202012Validator)
    kinds = ["note", "start", "file", "advance", "done", "done", "note", "advance", "stop"]
    assert [event["event"] for event in found] == kinds
    assert [event["nbytes"] for event in found if event["event"] in ("advance", "stop")] == [2000, 3002, 3002]
    assert {event["total_nbytes"] for event in found} == {None, 3000}
    assert [event["phase"] for event in found] == [None, *["writing"] * 8]
    assert (found[2]["resumed_nbytes"], found[4]["kept"], found[5]["kept"]) == (1000, False, True)


@pytest.mark.parametrize(
    ("how", "screen", "kind"),
    [
        ("auto", Terminal, BarProgress),
        ("auto", io.StringIO, LineProgress),
        ("plain", Terminal, LineProgress),
        ("json", Terminal, EventProgress),
        ("none", Terminal, Silent),
    ],
)
def test_progress_is_shown_as_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, how: str, screen: Callable[[], io.StringIO], kind: type[Progress]
) -> None:
    monkeypatch.setattr(sys, "stderr", screen())
    assert type(make_progress(how)) is kind


@pytest.mark.parametrize(
    "line",
    [
        "shard model --out {}",
        "check model",
        "manifest model --overwrite",
        "verify model",
        "cast model --dtype float16 --out {}",
    ],
)
def test_commands_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model", {"a": torch.ones(8), "b": torch.zeros(8)})
    assert run(["manifest", "model", "--quiet"]) == 0
    assert run([*line.format("json").split(), "--progress", "json"]) == 0
    found = [json.loads(each) for each in capsys.readouterr().err.splitlines() if each.startswith("{")]
    assert {event["event"] for event in found} >= {"start", "stop"}
    for i, options in enumerate((["--progress", "none"], ["--quiet", "--progress", "json"])):
        assert run([*line.format(f"out-{i}").split(), *options]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (5e6, "5.0 MB"), (2e9, "2.0 GB")],
)
def test_bytes_are_told_in_decimal_units(nbytes: float, text: str) -> None:
    assert human(nbytes) == text
    assert human(nbytes * 1e12 + 1e12).endswith("TB")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (40.4, "40 s"), (100, "2 min"), (3599, "1 h 0 min"), (4800, "1 h 20 min"), (90000, "25 h 0 min")],
)
def test_times_are_told_as_people_tell_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
