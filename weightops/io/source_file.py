"""What tells one content of a file from another: a value that a plan can record."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from weightops.io.escape import escape
from weightops.io.paths import open_regular


class SourceFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file as it was when its header was read.

    Of a file on a server `path` is the URL, and what tells its content from another is `digest`, an algorithm and
    hexadecimal digits like `sha256:ab12...`, or else the ETag.
    """

    path: str
    nbytes: int
    mtime_ns: int
    digest: str = ""
    etag: str = ""

    @property
    def scheme(self) -> str:
        """What the path of a file beyond this machine begins with, such as https; empty for one on it."""
        scheme, mark, _ = self.path.partition("://")  # which no path has, for Path joins slashes
        return scheme if mark else ""

    @property
    def is_remote(self) -> bool:
        """Whether the file lies beyond this machine."""
        return bool(self.scheme)

    @property
    def shown(self) -> str:
        """The path, safe for a terminal; of a URL without the query, which may hold a signature."""
        return escape(self.path.partition("?")[0] if self.is_remote else self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        if not self.is_remote:
            return Path(self.path).name
        from urllib.parse import unquote, urlsplit

        return unquote(urlsplit(self.path).path).rpartition("/")[2]

    @staticmethod
    def at(path: Path) -> SourceFile:
        """The regular file at `path` as it is now; raises as `open_regular` does."""
        fd = open_regular(path)
        try:
            return SourceFile.of(path, fd)
        finally:
            os.close(fd)

    @staticmethod
    def of(path: Path, fd: int) -> SourceFile:
        """The file that is open as `fd`."""
        status = os.fstat(fd)
        return SourceFile(str(path), status.st_size, status.st_mtime_ns)
