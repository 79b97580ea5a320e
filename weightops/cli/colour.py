"""Colour for people: on a terminal, unless the environment asks for none."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, TextIO

import click

Kind = Literal["good", "bad", "doubtful", "heading"]
_STYLES: Mapping[Kind, Mapping[str, Any]] = {
    "good": {"fg": "green"},
    "bad": {"fg": "red", "bold": True},
    "doubtful": {"fg": "yellow"},
    "heading": {"bold": True},
}


def styled(text: str, kind: Kind) -> str:
    """Text in the colour of its kind; `say` takes it out again where none is wanted."""
    return click.style(text, **_STYLES[kind])


def say(text: str, *, err: bool = False) -> None:
    """Print a text, in colour where it is wanted."""
    click.echo(text, err=err, color=is_wanted(sys.stderr if err else sys.stdout))


def is_wanted(stream: TextIO) -> bool:
    """Whether colour goes to a stream: by NO_COLOR, else FORCE_COLOR, else if it is a terminal that has colours."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()
