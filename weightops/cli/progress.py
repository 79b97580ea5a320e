"""Progress on stderr: bars on a terminal, a line per file elsewhere, JSON lines for programs."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from typing import Any

import click

from weightops.io.escape import escape

EVENT_SCHEMA = "weightops-event/1"
_EVENT_INTERVAL_S = 1.0
_MAX_NAME = 28


def human(nbytes: float) -> str:
    """Bytes for reading, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


class BarProgress:
    """A bar for the whole and one for each file in work; off a terminal one line per finished file."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._tty = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._bar: Any = None
        self._files: dict[str, Any] = {}
        self._resumed_nbytes = 0

    def start(self, what: str, total_nbytes: int) -> None:
        self._resumed_nbytes = 0
        if not self._quiet and self._tty:
            self._bar = self._new_bar(what, total_nbytes, 0)

    def _new_bar(self, what: str, total_nbytes: int, done_nbytes: int) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=total_nbytes or None,
            initial=done_nbytes,
            desc=what,
            unit="B",
            unit_scale=True,
            # Room for the ^C that a terminal echoes: wrapped, it would leave the bars standing.
            ncols=shutil.get_terminal_size().columns - 3,
            mininterval=0.2,
            leave=False,
        )

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None:
        with self._lock:
            if self._bar is None:
                return
            self._files[name] = self._new_bar(f"  {_short(name)}", nbytes, done_nbytes)
            if done_nbytes:
                # What was there already has cost no time: it must not count into the rate.
                for counter in ("n", "initial", "last_print_n"):
                    setattr(self._bar, counter, getattr(self._bar, counter) + done_nbytes)
                self._resumed_nbytes += done_nbytes
                self._bar.set_postfix_str(f"{human(self._resumed_nbytes)} resumed")

    def advance(self, nbytes: int, name: str = "") -> None:
        with self._lock:
            if self._bar is None:
                return
            self._bar.update(nbytes)
            if name in self._files:
                self._files[name].update(nbytes)

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        if self._quiet:
            return
        line = f"{'kept' if resumed else 'wrote'} {escape(name)} ({human(nbytes)})"
        with self._lock:
            bar = self._files.pop(name, None)
            if bar is not None:
                bar.close()
            self._say(line)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._say(text)

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            click.echo(line, err=True)

    def stop(self) -> None:
        with self._lock:
            bars = [*reversed(self._files.values()), self._bar] if self._bar is not None else []
            self._bar, self._files = None, {}
        for bar in bars:
            bar.close()


class EventProgress:
    """One JSON object per line on stderr: phases, files, and the bytes so far about once a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total_nbytes = self._nbytes = 0
        self._running = False
        self._last_s = 0.0

    def start(self, what: str, total_nbytes: int) -> None:
        self._total_nbytes, self._nbytes, self._running = total_nbytes, 0, True
        self._emit("start", what=what, total_nbytes=total_nbytes)

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None:
        self._nbytes += done_nbytes
        self._emit("file", name=name, nbytes=nbytes, resumed_nbytes=done_nbytes)

    def advance(self, nbytes: int, name: str = "") -> None:
        with self._lock:
            self._nbytes += nbytes
            now_s = time.monotonic()
            if now_s - self._last_s < _EVENT_INTERVAL_S:
                return
            self._last_s = now_s
        self._emit("progress", nbytes=self._nbytes, total_nbytes=self._total_nbytes)

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        self._emit("done", name=name, nbytes=nbytes, kept=resumed)

    def note(self, text: str) -> None:
        self._emit("note", text=text)

    def stop(self) -> None:
        if self._running:
            self._running = False
            self._emit("stop", nbytes=self._nbytes)

    def _emit(self, event: str, **fields: Any) -> None:
        with self._lock:
            click.echo(json.dumps({"schema": EVENT_SCHEMA, "event": event, **fields}), err=True)


def _short(name: str) -> str:
    """The end of a name, which tells shards apart, in a fixed width."""
    shown = escape(name)
    return (shown if len(shown) <= _MAX_NAME else "…" + shown[1 - _MAX_NAME :]).ljust(_MAX_NAME)


def percent(error: float) -> str:
    """A share of one, for reading."""
    return f"{100 * error:.3g} %"
