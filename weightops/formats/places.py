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
from weightops.stores.local import LocalStore
from weightops.stores.s3.places import is_bucket
from weightops.stores.store import Store

if TYPE_CHECKING:
    from weightops.stores.stores import Stores

_GLOB = re.compile(r"[*?[]")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\S+)?", re.ASCII)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is really a repository on a hub, a URL or a place in a bucket."""
    if "://" not in os.fspath(path):
        return False
    if is_bucket(os.fspath(path)):
        return True
    from weightops.stores.web.listing import is_location

    return is_location(os.fspath(path))


def is_repository_name(text: str) -> bool:
    """Whether a text has the form of a repository on a hub, `org/name` or `org/name@revision`."""
    return _REPOSITORY.fullmatch(text) is not None


def find_place(path: str | os.PathLike[str], stores: Stores) -> Store | SourceFile:
    """The folder or weight file that is meant; raises `SourceMissing`."""
    if is_bucket(os.fspath(path)):
        from weightops.formats.bucket_places import find_in_bucket

        return find_in_bucket(os.fspath(path), stores)
    if is_remote(path):
        from weightops.formats.web_places import find_remote

        return find_remote(os.fspath(path), stores)
    path = Path(path)
    if path.is_dir():
        return LocalStore(path)
    if path.exists():
        return SourceFile.at(path)
    if _GLOB.search(path.name) and path.parent.is_dir():
        return Matching(path.parent, path.name)
    raise SourceMissing(f"{escape(str(path))}: no such file or folder", hint=repository_hint(path))


def repository_hint(path: Path) -> str | None:
    """What to ask about a path at which nothing is, if it could be the name of a repository."""
    is_name = is_repository_name(str(path)) and not is_weights(path.name) and not path.parent.exists()
    return f"did you mean hf://{path}?" if is_name else None


class Matching(LocalStore):
    """A folder of which only the weight files that match a pattern are looked at."""

    def __init__(self, root: Path, pattern: str) -> None:
        super().__init__(root)
        self._pattern = pattern
        if not any(map(is_weights, self.names())):
            raise SourceMissing(f"{self.shown}: no weight file matches {escape(pattern)}")

    def names(self) -> list[str]:
        """What lies in it, sorted, without weights that do not match, and without indexes, which list others."""
        return chosen(super().names(), self._pattern)


def store_beside(file: SourceFile) -> Store | None:
    """Where what lies beside a weight file can be found, if that can be said."""
    return None if file.is_remote else LocalStore(Path(file.path).parent)
