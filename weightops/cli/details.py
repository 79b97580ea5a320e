"""--verbose: what is done with which files, and how long it takes, as the modules of weightops log it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from weightops.cli.meter import Meter, duration, human
from weightops.engine.control import Progress, Silent

_LOG = logging.getLogger("weightops")


class _Notes(logging.Handler):
    """Shows what is logged as notes of the progress, with the seconds since the command began."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress, self._started_s = progress, time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{time.monotonic() - self._started_s:8.2f} s  {record.getMessage()}"
        if isinstance(self._progress, Silent):
            click.echo(line, err=True)  # who asked for no progress still asked for this
        else:
            self._progress.note(line)


class Timed:
    """Progress that also says, at its end, how long each phase has taken."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._meter: Meter | None = None

    def start(self, what: str, total_nbytes: int) -> None:
        self._meter = Meter(what, total_nbytes)
        self._progress.start(what, total_nbytes)

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None:
        if self._meter is not None:
            self._meter.begin_file(name, done_nbytes)
        self._progress.start_file(name, nbytes, done_nbytes)

    def advance(self, nbytes: int, name: str = "") -> None:
        if self._meter is not None:
            self._meter.add(nbytes)
        self._progress.advance(nbytes, name)

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        if self._meter is not None:
            self._meter.finish_file(name, nbytes, resumed)
        self._progress.finish_file(name, nbytes, resumed)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def stop(self) -> None:
        meter, self._meter = self._meter, None
        self._progress.stop()
        if meter is not None:
            _LOG.info("%s took %s: %s", meter.phase, duration(meter.elapsed_s), human(meter.nbytes))


@contextmanager
def showing_details(progress: Progress) -> Iterator[None]:
    """What is logged meanwhile is shown as notes of the progress, although `main` keeps libraries quiet."""
    handler, level, silenced = _Notes(progress), _LOG.level, logging.root.manager.disable
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        logging.disable(silenced)
        _LOG.removeHandler(handler)
        _LOG.setLevel(level)
