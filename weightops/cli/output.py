"""What people and programs see: results on stdout, everything else on stderr, JSON as one document."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from weightops.engine.control import Control
from weightops.io.escape import escape, is_harmless

ERROR_SCHEMA = "weightops-error/1"


def report_error(message: str, hint: str | None, exit_code: int, as_json: bool) -> int:
    """Say what went wrong; returns the exit code."""
    text = escape_lines(message)
    click.echo(f"Error: {text}", err=True)
    if hint:
        click.echo(f"Hint: {escape_lines(hint)}", err=True)
    if as_json:
        print_json({"schema": ERROR_SCHEMA, "error": message, "hint": hint, "exit_code": exit_code})
    return exit_code


def escape_lines(text: str) -> str:
    """Several lines made safe for a terminal, each of any length."""
    return "\n".join("".join(c if is_harmless(c) else escape(c) for c in line) for line in text.split("\n"))


def print_json(document: Any) -> None:
    """The one document on stdout."""
    click.echo(json.dumps(document, indent=2))


def warn(warnings: Iterable[str]) -> None:
    """Notes that change nothing about the result."""
    for warning in warnings:
        click.echo(f"Warning: {escape_lines(warning)}", err=True)


def human(nbytes: float) -> str:
    """Bytes for reading, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns aligned by their widest cell; those in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class BarProgress:
    """Progress in bytes: a bar on a terminal, one line per file elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._tty = sys.stderr.isatty()
        self._bar: Any = None

    def start(self, what: str, total_nbytes: int) -> None:
        if self._quiet or not self._tty:
            return
        from tqdm import tqdm

        self._bar = tqdm(
            total=total_nbytes, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.2, leave=False
        )

    def advance(self, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.update(nbytes)

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        if self._quiet:
            return
        line = f"{'kept' if resumed else 'wrote'} {escape(name)} ({human(nbytes)})"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            click.echo(line, err=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def running(quiet: bool) -> Iterator[Control]:
    """A control that shows progress, and that SIGINT and SIGTERM cancel; a second signal ends at once."""
    progress = BarProgress(quiet)
    control = Control(progress)

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        control.cancel(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield control
    finally:
        progress.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
