"""What a finished output becomes: a folder, or a single file with its manifest beside it.

Either appears under its name when it is whole, and neither takes the place of anything unless it is asked to.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from weightops.errors import OutputExists
from weightops.formats.proofs import manifest
from weightops.io.atomic import fsync_folder
from weightops.io.escape import escape
from weightops.io.platform.entries import TAKEN, exchange, give_name, is_link, rename, replace_file


class Place(ABC):
    """The name `out`, and what may be done to what is there."""

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out, self._overwrite = out, overwrite

    @property
    @abstractmethod
    def manifest(self) -> Path:
        """Where the manifest of the finished output lies."""

    @abstractmethod
    def refuse_existing(self) -> None:
        """Raise `OutputExists` for what is in the way, which includes links."""

    @abstractmethod
    def publish(self, staged: Path, aside: Path) -> None:
        """Give what is in the folder `staged` its name; what it replaces goes to `aside`. Raises `OutputExists`."""

    def _exists(self, path: Path) -> OutputExists:
        return OutputExists(
            f"{escape(str(path))} exists", hint="choose another --out, or give --overwrite to replace it when done"
        )

    def _appeared(self, path: Path, staged: Path) -> OutputExists:
        return OutputExists(
            f"{escape(str(path))} appeared while this run was at work, and is left alone; what was made is whole, "
            f"in {escape(str(staged))}",
            hint="move the other one away, and run the same command again: it only gives this its name",
        )


class FolderTarget(Place):
    """A folder, which appears by one rename."""

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        super().__init__(out, overwrite=overwrite)
        self._replaced = _identity(out)

    @property
    def manifest(self) -> Path:
        return self.out / manifest.NAME

    def refuse_existing(self) -> None:
        out, shown = self.out, escape(str(self.out))
        if is_link(out) or (out.exists() and not out.is_dir()):
            what = "is a link" if is_link(out) else "exists and is not a folder"
            raise OutputExists(f"{shown} {what}", hint="choose another --out")
        if os.path.ismount(out):
            raise OutputExists(
                f"{shown} is where a file system is mounted, so that nothing can be put in its place",
                hint=f"write into it: --out {shown}/NAME",
            )
        if out.exists() and any(out.iterdir()) and not self._overwrite:
            raise self._exists(out)

    def publish(self, staged: Path, aside: Path) -> None:
        try:
            rename(staged, self.out)
            return
        except OSError as error:
            if error.errno not in TAKEN:
                raise
        if not self._overwrite or is_link(self.out) or _identity(self.out) != self._replaced:
            raise self._appeared(self.out, staged)
        if exchange(staged, self.out):
            rename(staged, aside)
        else:
            rename(self.out, aside)
            rename(staged, self.out)


class FileTarget(Place):
    """A single file. Its manifest, `OUT.weightops-manifest.json`, is there before it."""

    @property
    def manifest(self) -> Path:
        return manifest.beside(self.out)

    def refuse_existing(self) -> None:
        for path in (self.out, self.manifest):
            if is_link(path) or (path.exists() and not path.is_file()):
                what = "is a link" if is_link(path) else "exists and is not a file"
                raise OutputExists(f"{escape(str(path))} {what}", hint="choose another --out")
            if path.exists() and not self._overwrite:
                raise self._exists(path)

    def publish(self, staged: Path, aside: Path) -> None:
        for source, path in ((staged / manifest.NAME, self.manifest), (staged / self.out.name, self.out)):
            if self._overwrite and source.exists():
                replace_file(source, path)
            elif not self._overwrite:
                self._name(source, path, staged)
            fsync_folder(path.parent)

    def _name(self, source: Path, path: Path, staged: Path) -> None:
        try:
            give_name(source, path)
        except FileExistsError:
            if is_link(path) or not os.path.samefile(source, path):
                raise self._appeared(path, staged) from None
            # Else a run that was killed here has done it.


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
