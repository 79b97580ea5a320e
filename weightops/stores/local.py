"""Folders on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from weightops.errors import CorruptInput, SourceMissing, WeightopsError
from weightops.io.atomic import make_folder, publish, remove_left, temporary_of, write_new, write_whole, writing_whole
from weightops.io.direct import DirectFile, write_failure
from weightops.io.escape import escape
from weightops.io.paths import inside, open_regular
from weightops.io.platform.files import read_at
from weightops.io.reflink import Extent
from weightops.io.source_file import SourceFile

_MAX_NBYTES = 200_000_000


class LocalStore:
    """A folder on disk. Links are followed as far as they stay inside, and only regular files are opened.

    For writing no link is followed. What is written is flushed to disk before it has its name.
    """

    is_near = True
    notes: tuple[str, ...] = ()

    def __init__(self, root: Path, *, is_there: bool = False) -> None:
        """If the folder `is_there`, it is not made when something is written to it, but missed when it is gone."""
        self.root = root
        self._is_there = is_there
        self.shown = escape(str(root))
        self.name = root.resolve().name

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.root.iterdir())

    def below(self, pattern: str) -> list[str]:
        folders = [f for f in self.root.glob(pattern) if f.is_dir() and not f.is_symlink()]
        return sorted(f"{folder.name}/{file.name}" for folder in folders for file in folder.iterdir())

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def identity(self, name: str) -> SourceFile:
        return SourceFile.at(inside(self.root, name, str(self.root)))

    def get(self, name: str) -> bytes:
        return read_source(inside(self.root, name, str(self.root)))[1]

    def probe(self) -> None:
        """Nothing to doubt: names are created by links, which a system makes once."""

    def create(self, name: str, data: bytes) -> None:
        write_new(self._place(name), data)

    def put(self, name: str, data: bytes) -> None:
        write_whole(self._place(name), data)

    def remove(self, name: str) -> None:
        path = inside(self.root, name, str(self.root))
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise write_failure(path, error) from None

    def find(self, name: str) -> bytes | None:
        try:
            return self.get(name)
        except SourceMissing:
            return None

    def listed(self, folder: str) -> list[str]:
        root = inside(self.root, folder, str(self.root)) if folder else self.root
        found = (Path(path, name) for path, _, names in os.walk(root) for name in names)
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    @contextmanager
    def putting(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """As `put`, piece by piece: lends a function that takes them."""
        with writing_whole(self._place(name)) as write:
            yield write

    def target(
        self, name: str, nbytes: int, shared: Mapping[SourceFile, Sequence[Extent]] = {}, *, is_most: bool = False
    ) -> LocalTarget:
        """A file to be written piece by piece; what it shares with other files see `DirectFile`."""
        return LocalTarget(self._place(name), 0 if is_most else nbytes, shared)

    def _place(self, name: str) -> Path:
        path = inside(self.root, name, str(self.root))
        if self._is_there and path.parent == self.root:
            if not self.root.is_dir():
                raise SourceMissing(f"{self.shown}: there is no such folder any more")
        else:
            make_folder(path.parent)
        return path


class LocalTarget(DirectFile):
    """A file beside the place where it will be, under a temporary name."""

    def __init__(self, final: Path, nbytes: int, shared: Mapping[SourceFile, Sequence[Extent]]) -> None:
        self._final = final
        self._temporary = final.with_name(temporary_of(final.name))
        remove_left(final)
        super().__init__(self._temporary, nbytes, shared=shared)

    def commit(self) -> None:
        publish(self._temporary, self._final)

    def abandon(self) -> None:
        super().abandon()
        with suppress(OSError):
            self._temporary.unlink()


def read_from(fd: int, file: SourceFile, offset: int, out: memoryview) -> None:
    """Fill `out` with the bytes at `offset` of a file that is open.

    Raises `CorruptInput` if the file ends before, `WeightopsError` if the disk fails.
    """
    done = 0
    try:
        while done < len(out):
            count = read_at(fd, out[done:], offset + done)
            if count == 0:
                raise CorruptInput(f"{file.shown}: ends at byte {offset + done}, expected {file.nbytes} bytes")
            done += count
    except OSError as error:
        raise WeightopsError(f"{file.shown}: cannot be read at byte {offset + done} ({error.strerror})") from None


def read_source(path: Path) -> tuple[SourceFile, bytes]:
    """A small file, whole, with its identity. For config, index and manifest files."""
    fd = open_regular(path)
    try:
        file = SourceFile.of(path, fd)
        if file.nbytes > _MAX_NBYTES:
            raise CorruptInput(f"{file.shown}: {file.nbytes} bytes is too large for a file of this kind")
        with os.fdopen(os.dup(fd), "rb") as stream:
            return file, stream.read()
    finally:
        os.close(fd)
