"""Folders of files on disk, by name; on servers they are in `weightops.stores.web.folder`."""

from __future__ import annotations

from pathlib import Path

from weightops.io.escape import escape
from weightops.io.paths import inside
from weightops.io.source_file import SourceFile
from weightops.stores.reader import read_source


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
