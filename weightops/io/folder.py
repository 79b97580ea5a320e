"""Folders of files, by name: on disk here, on servers in `weightops.remote.folder`; opening is the same for both."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from weightops.io.escape import escape
from weightops.io.paths import inside
from weightops.io.source import SourceFile, read_source


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


class LocalFolder:
    """A folder on disk. Links are followed as far as they stay inside, and only regular files are opened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shown = escape(str(root))
        self.name = root.resolve().name

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.root.iterdir())

    def below(self, pattern: str) -> list[str]:
        folders = [f for f in self.root.glob(pattern) if f.is_dir() and not f.is_symlink()]
        return sorted(f"{folder.name}/{file.name}" for folder in folders for file in folder.iterdir())

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def file(self, name: str) -> SourceFile:
        return SourceFile.at(inside(self.root, name, str(self.root)))

    def read(self, name: str) -> bytes:
        return read_source(inside(self.root, name, str(self.root)))[1]
