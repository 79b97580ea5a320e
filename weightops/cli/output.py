"""What people and programs see: results on stdout, everything else on stderr, JSON as one document."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from weightops.cli.hub_cache import hub_cache, is_offline
from weightops.cli.progress import BarProgress, EventProgress
from weightops.engine.control import Control
from weightops.errors import WeightopsError
from weightops.io.atomic import write_whole
from weightops.io.escape import escape, is_harmless
from weightops.stores.stores import WEB, Stores

if TYPE_CHECKING:
    from weightops.stores.web.web import Web

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


def save_report(path: Path, data: bytes) -> int:
    """Write a report of what has been said already; the exit code, for what was said counts even if this fails."""
    try:
        write_whole(path, data)
    except WeightopsError as error:
        return report_error(str(error), error.hint, error.exit_code, False)
    return 0


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


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns aligned by their widest cell; those in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@contextmanager
def running(quiet: bool, *, events: bool = False, connect: Callable[[], Web] | None = None) -> Iterator[Control]:
    """A control that shows progress, and that SIGINT and SIGTERM cancel; a second signal ends at once.

    With `events` progress is lines of JSON. `connect` makes connections to servers, if such are wanted: by default
    those that the environment describes, as it does the Hugging Face cache.
    """
    progress = EventProgress() if events and not quiet else BarProgress(quiet)

    def open_web() -> Web:
        from weightops.cli import network  # imported here because most commands need no network

        web = (connect or network.open_web)()
        web.on_wait = progress.note
        return web

    stores = Stores(connect={WEB: open_web}, cache=hub_cache(), offline=is_offline())
    control = Control(progress, stores=stores)

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        control.cancel(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with control.stores.connected():
            yield control
    finally:
        progress.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
