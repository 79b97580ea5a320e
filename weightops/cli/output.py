"""What people and programs see: results on stdout, everything else on stderr, JSON as one document."""

from __future__ import annotations

import json
import platform
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import msgspec

from weightops.cli.colour import say, styled
from weightops.cli.hub_cache import hub_cache, is_offline
from weightops.cli.progress import make_progress
from weightops.errors import UsageError, WeightopsError
from weightops.io import strict_json
from weightops.io.escape import escape, is_harmless
from weightops.stores.stores import BUCKETS, WEB, Stores

if TYPE_CHECKING:
    from weightops.stores.s3.connection import S3
    from weightops.stores.web.policy import Policy
    from weightops.stores.web.web import Web

if TYPE_CHECKING:
    from weightops.engine.control import Control

PROGRESS = "weightops.progress"
"""Where the context of a command has how to show progress."""
VERBOSE = "weightops.verbose"
"""And whether to say what is done with which files."""


class ErrorDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-error/2"):
    """What any command prints with `--json` in the place of its own document when it fails.

    `error` is the class of `weightops.errors`, or of Python for what nobody foresaw.
    """

    error: str
    exit_code: int
    message: str
    hint: str | None


def report_error(error: ErrorDocument, as_json: bool, verbose: bool = False) -> int:
    """Say what went wrong, on stderr, and with `as_json` on stdout too; returns the exit code.

    With `verbose` also which versions were at work.
    """
    say(f"{styled('Error:', 'bad')} {escape_lines(error.message)}", err=True)
    if error.hint:
        say(f"Hint: {escape_lines(error.hint)}", err=True)
    if verbose:
        from weightops.cli.machine import versions

        found = [(name, version) for name, version in versions().items() if version]
        say(f"{table(found, heads=False)}\nsystem           {platform.platform()}", err=True)
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
    from weightops.io.atomic import write_whole

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
        say(f"{styled('Warning:', 'doubtful')} {escape_lines(warning)}", err=True)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), *, heads: bool = True) -> str:
    """Columns aligned by their widest cell; those in `right` to the right. The first row is `heads` of columns."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = (gap + cell if i in right else cell + gap for i, (cell, gap) in enumerate(zip(row, gaps, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join([styled(lines[0], "heading"), *lines[1:]] if heads else lines)


def _width(cell: str) -> int:
    return len(click.unstyle(cell))


@contextmanager
def running(
    quiet: bool,
    *,
    connect: Callable[[], Web] | None = None,
    policy: Policy | None = None,
    time_limit_s: float | None = None,
) -> Iterator[Control]:
    """A control that shows progress as --progress says, and that SIGINT, SIGTERM and Windows' SIGBREAK cancel.

    A second signal ends at once.

    With `quiet` it shows none. `connect` makes connections to servers, if such are wanted: by default those that the
    environment describes, as it does the Hugging Face cache. `policy` is that for buckets. After `time_limit_s` it is
    cancelled as by SIGTERM.
    """
    from weightops.engine.control import Control  # imported here because help and completion do without it

    meta = click.get_current_context().meta
    progress = make_progress("none" if quiet else meta.get(PROGRESS, "auto"))
    is_verbose = meta.get(VERBOSE, False)
    if is_verbose and quiet:
        raise UsageError("--verbose says more and --quiet less", hint="leave out one of the two")

    def open_web() -> Web:
        from weightops.cli import network  # imported here because most commands need no network

        web = (connect or network.open_web)()
        web.on_wait = progress.note
        return web

    def open_buckets() -> S3:
        from weightops.cli import network

        buckets = network.open_buckets(policy)
        buckets.on_wait = progress.note
        return buckets

    stores = Stores(connect={WEB: open_web, BUCKETS: open_buckets}, cache=hub_cache(), offline=is_offline())
    control = Control(progress, stores=stores, time_limit_s=time_limit_s)
    details: AbstractContextManager[None] = nullcontext()
    if is_verbose:
        from weightops.cli.details import Timed, showing_details

        control, details = Control(Timed(progress), stores=stores, time_limit_s=time_limit_s), showing_details(progress)

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        control.cancel(number)

    numbers = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGBREAK"))
    previous = {number: signal.signal(number, handle) for number in numbers if number is not None}
    try:
        with details, control.stores.connected():
            yield control
    finally:
        progress.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
