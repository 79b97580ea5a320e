"""What is told while a file is fetched."""

from __future__ import annotations

from typing import Protocol

from weightops.stores.web.listing import RemoteFile


class Events(Protocol):
    """Told what happens to files, from any thread."""

    def started(self, name: str, nbytes: int, done_nbytes: int) -> None:
        """Work on a file begins; so much of it was there."""

    def advanced(self, name: str, nbytes: int) -> None:
        """So many more bytes arrived, or (below zero) turned out to be of no use."""

    def look(self, file: RemoteFile, head: bytes, content_type: str, *, doubtful: bool) -> None:
        """Raise if a file that begins with these bytes is not worth fetching; `doubtful` if its size is wrong."""
