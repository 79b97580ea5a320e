"""Places as people name them: a path on this machine, or the URL of a place elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.stores.s3.places import parse_place

Out = Path | str
"""Where an output goes: a path, or the URL of a bucket and prefix."""
WRITABLE = ("s3",)
"""What URLs begin with that can be written to."""


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is named by a URL."""
    return "://" in os.fspath(place)


def as_out(place: str | os.PathLike[str]) -> Out:
    """The place of an output; raises `UsageError` for a URL that nothing can be written to."""
    text = os.fspath(place)
    if not is_url(text):
        return Path(text)
    if text.partition("://")[0] not in WRITABLE:
        raise UsageError(
            f"{escape(text)}: nothing can be written there",
            hint="name a folder on this machine, or s3://BUCKET/PREFIX",
        )
    parse_place(text)  # which refuses what holds a password, before it is shown or written anywhere
    return text.rstrip("/")
