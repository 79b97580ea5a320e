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
    hexadecimal digits like `sha256:ab12...`, or else the ETag. Of a file in a cache on this machine `path` is a URL
    without a host, such as `hf-cache:///home/...`, and tells it by `digest` too.
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
        """Whether the file is read through a store's `Remote`, which holds it against its digest."""
        return bool(self.scheme)

    @property
    def is_on_server(self) -> bool:
        """Whether its bytes come over the network."""
        return self.is_remote and not self.path.startswith("/", len(self.scheme) + 3)

    @property
    def shown(self) -> str:
        """The path, safe for a terminal; of a URL without user, password and query, which may hold a signature."""
        if self.is_on_server:
            scheme, mark, rest = self.path.partition("?")[0].partition("://")
            host, slash, path = rest.partition("/")
            return escape(f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}")
        return escape(str(self.local_path))

    @property
    def local_path(self) -> Path:
        """Where a file on this machine lies."""
        if not self.is_remote:
            return Path(self.path)
        from urllib.parse import unquote

        text = unquote(self.path.partition(":///")[2])
        return Path(text) if Path(text).is_absolute() else Path(f"/{text}")  # one with a drive is absolute without

    @property
    def name(self) -> str:
        """The last part of the path."""
        if not self.is_on_server:
            return self.local_path.name
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
