"""weightops browse"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from weightops.cli.output import running
from weightops.cli.params import SOURCE, Command, epilog
from weightops.errors import UsageError


@click.command("browse", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 13, 14, 130)))
@click.argument("source", type=SOURCE)
@click.argument("second", type=SOURCE, required=False)
def command(source: Path | str, second: Path | str | None) -> None:
    """Walk through a model in the terminal, or through two side by side.

    SOURCE and SECOND are folders, weight files, hf://org/name[@revision] or URLs. Only headers are read at first, so
    that a model of any size is there at once. A tensor on which the cursor rests is read then: its statistics, a
    histogram and its digest. On a server it waits for the key s. Two models are paired as `compare` pairs them,
    whatever layout each is in; of a tensor and its partner you see what kind of change it is, and how large. The tree
    marks what only one of the two has.

    \b
    Example:
      weightops browse ./model
      weightops browse ./base ./tuned

    Arrows move; Enter, right and left open and close; / searches, n and N go on; c shows config.json, m files and
    metadata, t the tensor again; z closes all; q or Ctrl-C ends. This command needs the extra `tui`, which
    `pip install 'weightops[tui]'` brings.
    """
    try:
        import textual  # noqa: F401  # to say in a sentence that it is not there
    except ImportError:
        raise UsageError(
            "browse needs the textual package, which is not installed", hint="pip install 'weightops[tui]'"
        ) from None
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)) or os.environ.get("TERM") == "dumb":
        raise UsageError(
            "browse needs a terminal, and this is none", hint="`weightops inspect --tree` prints what there is"
        )
    from weightops.cli.browse.app import Browser
    from weightops.cli.browse.subject import Subject, open_side

    with running(True) as control, control.stores.connected():
        subject = Subject.of(
            *(open_side(each, control) for each in (source, second) if each is not None), control=control
        )
        browser = Browser(subject, control)
        browser.run()
    click.get_current_context().exit(browser.return_code or 0)
