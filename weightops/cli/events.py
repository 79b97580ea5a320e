"""Progress for programs: one JSON object per line on stderr."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Literal

import click
import msgspec

from weightops.cli.meter import Meter
from weightops.io.strict_json import as_json

Schema = Literal["weightops-progress/1"]
SCHEMA: Schema = "weightops-progress/1"
_INTERVAL_S = 1.0


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """How far a phase is: `nbytes` of `total_nbytes` (null if that is not known) are done, at `nbytes_per_s`.

    `eta_s` are the seconds that it will take at this rate. Outside of a phase these are null, and `nbytes` is 0.
    """

    schema: Schema
    phase: str | None
    nbytes: int
    total_nbytes: int | None
    nbytes_per_s: float | None
    eta_s: float | None


class Started(_Event, frozen=True, kw_only=True, tag="start"):
    """A phase has begun."""


class FileStarted(_Event, frozen=True, kw_only=True, tag="file"):
    """A file is begun, of which so many bytes were there before."""

    name: str
    file_nbytes: int
    resumed_nbytes: int


class Advanced(_Event, frozen=True, kw_only=True, tag="advance"):
    """How far it is, about once a second."""


class FileDone(_Event, frozen=True, kw_only=True, tag="done"):
    """A file is finished, now or (`kept`) by an earlier run."""

    name: str
    file_nbytes: int
    kept: bool


class Noted(_Event, frozen=True, kw_only=True, tag="note"):
    """Something that a waiting person would want to know."""

    text: str


class Stopped(_Event, frozen=True, kw_only=True, tag="stop"):
    """The phase is over, or was cut short, after so many seconds."""

    elapsed_s: float


Event = Started | FileStarted | Advanced | FileDone | Noted | Stopped


class EventProgress:
    """Progress as events."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._meter: Meter | None = None
        self._last_s = 0.0

    def start(self, what: str, total_nbytes: int) -> None:
        with self._lock:
            self._meter = Meter(what, total_nbytes)
            self._emit(Started)

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None:
        with self._lock:
            if self._meter is not None:
                self._meter.begin_file(name, done_nbytes)
            self._emit(FileStarted, name=name, file_nbytes=nbytes, resumed_nbytes=done_nbytes)

    def advance(self, nbytes: int, name: str = "") -> None:
        with self._lock:
            if self._meter is not None:
                self._meter.add(nbytes)
            now_s = time.monotonic()
            if now_s - self._last_s >= _INTERVAL_S:
                self._last_s = now_s
                self._emit(Advanced)

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        with self._lock:
            if self._meter is not None:
                self._meter.finish_file(name, nbytes, resumed)
            self._emit(FileDone, name=name, file_nbytes=nbytes, kept=resumed)

    def note(self, text: str) -> None:
        with self._lock:
            self._emit(Noted, text=text)

    def stop(self) -> None:
        with self._lock:
            if self._meter is not None:
                self._emit(Stopped, elapsed_s=round(self._meter.elapsed_s, 3))
            self._meter = None

    def _emit(self, kind: type[Event], **fields: Any) -> None:
        meter = self._meter
        rate, eta_s = (meter.nbytes_per_s, meter.eta_s) if meter else (None, None)
        event = kind(
            schema=SCHEMA,
            phase=meter.phase if meter else None,
            nbytes=meter.nbytes if meter else 0,
            total_nbytes=meter.total_nbytes if meter else None,
            nbytes_per_s=None if rate is None else round(rate, 3),
            eta_s=None if eta_s is None else round(eta_s, 3),
            **fields,
        )
        click.echo(json.dumps(as_json(event)), err=True)
