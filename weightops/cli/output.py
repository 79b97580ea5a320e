"""What people and programs see: results on stdout, everything else on stderr, JSON as one document."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import msgspec

from weightops.cli.hub_cache import hub_cache, is_offline
from weightops.cli.progress import make_progress
from weightops.engine.control import Control
from weightops.errors import WeightopsError
from weightops.io import strict_json
from weightops.io.atomic import write_whole
from weightops.io.escape import escape, is_harmless
from weightops.stores.stores import WEB, Stores

if TYPE_CHECKING:
    from weightops.stores.web.web import Web

PROGRESS = "weightops.progress"
"""Where the context of a command has how to show progress."""


class ErrorDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-error/2"):
    """What any command prints with `--json` in the place of its own document when it fails.

    `error` is the class of `weightops.errors`, or of Python for what nobody foresaw.
    """

    error: str
    exit_code: int
    message: str
    hint: str | None


def report_error(error: ErrorDocument, as_json: bool) -> int:
    """Say what went wrong, on stderr, and with `as_json` on stdout too; returns the exit code."""
    click.echo(f"Error: {escape_lines(error.message)}", err=True)
    if error.hint:
        click.echo(f"Hint: {escape_lines(error.hint)}", err=True)
    if as_json:
        print_json(strict_json.as_json(error))
    return error.exit_code


def document_of(error: WeightopsError) -> ErrorDocument:
    """What there is to say of an error of ours."""
    return ErrorDocument(
        error=type(error).__name__, exit_code=error.exit_code, message=str(error), hint=error.hint or None
    )


def save_report(path: Path, data: bytes) -> int:
    """Write a report of what has been said already; the exit code, for what was said counts even if this fails."""
    try:
        write_whole(path, data)
    except WeightopsError as error:
        return report_error(document_of(error), False)
    return 0


def escape_lines(text: str) -> str:
    """Several lines made safe for a terminal, each of any length."""
    return "\n".join("".join(c if is_harmless(c) else escape(c) for c in line) for line in text.split("\n"))


def print_json(document: Mapping[str, Any]) -> None:
    """The one document on stdout; in ASCII, whatever the encoding of stdout."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


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
def running(quiet: bool, *, connect: Callable[[], Web] | None = None) -> Iterator[Control]:
    """A control that shows progress as --progress says, and that SIGINT, SIGTERM and Windows' SIGBREAK cancel.

    A second signal ends at once.

    With `quiet` it shows none. `connect` makes connections to servers, if such are wanted: by default those that the
    environment describes, as it does the Hugging Face cache.
    """
    progress = make_progress("none" if quiet else click.get_current_context().meta.get(PROGRESS, "auto"))

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

    numbers = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGBREAK"))
    previous = {number: signal.signal(number, handle) for number in numbers if number is not None}
    try:
        with control.stores.connected():
            yield control
    finally:
        progress.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
