"""What a path or URL means: a folder of files, or one weight file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.errors import SourceMissing
from weightops.formats.choose import chosen, is_weights
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.stores.local import LocalFolder
from weightops.stores.store import Folder

if TYPE_CHECKING:
    from weightops.stores.web.web import Web

_GLOB = re.compile(r"[*?[]")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is really a repository on a hub or a URL."""
    if "://" not in os.fspath(path):
        return False
    from weightops.stores.web.listing import is_location

    return is_location(os.fspath(path))


def find_place(path: str | os.PathLike[str], web: Web | None) -> Folder | SourceFile:
    """The folder or weight file that is meant; raises `SourceMissing`."""
    if web is not None and is_remote(path):
        from weightops.formats.web_places import find_remote

        return find_remote(os.fspath(path), web)
    path = Path(path)
    if path.is_dir():
        return LocalFolder(path)
    if path.exists():
        return SourceFile.at(path)
    if _GLOB.search(path.name) and path.parent.is_dir():
        return _Matching(path.parent, path.name)
    raise SourceMissing(f"{escape(str(path))}: no such file or folder")


class _Matching(LocalFolder):
    """A folder of which only the weight files that match a pattern are looked at."""

    def __init__(self, root: Path, pattern: str) -> None:
        super().__init__(root)
        self._pattern = pattern
        if not any(map(is_weights, self.names())):
            raise SourceMissing(f"{self.shown}: no weight file matches {escape(pattern)}")

    def names(self) -> list[str]:
        """What lies in it, sorted, without weights that do not match, and without indexes, which list others."""
        return chosen(super().names(), self._pattern)
