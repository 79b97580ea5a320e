"""Checksum lists of published weights, found by name.

They ship with the package; `manifests/README.md` says where each comes from.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from weightops.errors import SourceMissing
from weightops.io.escape import escape

_INSTALLED = Path(__file__).parents[2] / "_manifests"
_CHECKOUT = Path(__file__).parents[3] / "manifests"


def published() -> dict[str, Path]:
    """The lists that ship with weightops, by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.md5"), key=lambda path: path.stem)}


def _folder() -> Path:
    return _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def repository_of(name: str) -> str | None:
    """The hub repository whose files the published list `name` is of; None for what is not to be had from a hub."""
    entry = json.loads((_folder() / "sources.json").read_bytes()).get(name)
    return entry["repository"] if entry is not None else None


def find_manifest(name_or_path: str) -> Path:
    """The manifest or checksum list at this path, or else the published list of this name.

    A folder does not count as a path: the recovered weights may well be in one that is called like their list.
    Raises `SourceMissing`, which names the published lists, when there is neither.
    """
    path = Path(name_or_path)
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    known = published()
    if name_or_path in known:
        return known[name_or_path]
    close = difflib.get_close_matches(name_or_path, known, n=1)
    raise SourceMissing(
        f"{escape(name_or_path)}: no such file, and no published list of that name"
        f" (there are {', '.join(known) or 'none'})",
        hint=f"did you mean {close[0]}?" if close else None,
    )
