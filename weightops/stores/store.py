"""What a place of files is asked for."""

from __future__ import annotations

from typing import Protocol

from weightops.io.source_file import SourceFile

SKIPPED_NBYTES = 1 << 20
"""A gap in a file on a server that is read through on the way to a tensor: that is faster than a new request."""


class Folder(Protocol):
    """Files by name. Names from indexes and listings are held against `check_relative` wherever one is opened."""

    @property
    def shown(self) -> str:
        """Where it is, safe for a terminal."""

    @property
    def name(self) -> str:
        """What the checkpoint in it is called."""

    def names(self) -> list[str]:
        """What lies directly in it, sorted."""

    def below(self, pattern: str) -> list[str]:
        """The files directly in subfolders whose name matches a glob, as `folder/file`, sorted."""

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, which may be that of one in a subfolder."""

    def file(self, name: str) -> SourceFile:
        """A file's identity; raises `CorruptInput` for names that leave the folder, `SourceMissing`."""

    def read(self, name: str) -> bytes:
        """A small file, whole; raises as `file` does."""
