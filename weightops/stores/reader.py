"""Source files: an identity that a plan can record, and reads that notice when it no longer holds."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.errors import CorruptInput, WeightopsError
from weightops.io.paths import open_regular
from weightops.io.platform.files import advise_in_order, advise_soon
from weightops.io.source_file import SourceFile
from weightops.stores.local import read_from

if TYPE_CHECKING:
    from weightops.stores.stores import Stores

_READ_AHEAD = 16 << 20


class FileReader:
    """Positioned reads from source files, for one thread; descriptors are kept in a small cache.

    `pread` rather than mmap: a file that is truncated while mapped kills the process, and touched pages of a
    mapping count as memory. Files on servers and in caches are read through `stores`.
    """

    def __init__(self, stores: Stores | None = None, max_open: int = 32) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self._max_open = max_open
        self._seen: dict[str, SourceFile] = {}
        self._advised: dict[str, int] = {}
        """Up to where the system was told that a file will be read."""
        self._stores = stores

    def _descriptor(self, file: SourceFile) -> int:
        fd = self._open.get(file.path)
        if fd is not None:
            self._open.move_to_end(file.path)
            return fd
        fd = open_regular(Path(file.path))
        self._open[file.path] = fd
        self._seen[file.path] = file
        _check_unchanged(file, fd)
        while len(self._open) > self._max_open:
            path, oldest = self._open.popitem(last=False)
            _check_unchanged(self._seen[path], oldest)
            os.close(oldest)
        advise_in_order(fd)
        return fd

    def read_into(self, file: SourceFile, offset: int, out: memoryview, following: int = 0) -> None:
        """Fill `out` with the bytes at `offset`; so many `following` ones will be wanted next.

        Raises `CorruptInput` if the file ends before, `WeightopsError` if the disk fails; as `Remote.read_into` does
        for a file that is read through that.
        """
        if file.is_remote:
            if self._stores is None:
                raise WeightopsError(
                    f"{file.shown}: is on a server or in a cache", hint="give the Stores to read it through"
                )
            self._stores.reader_of(file).read_into(file, offset, out, following)
            return
        fd = self._descriptor(file)
        read_from(fd, file, offset, out)
        if len(out) >= 1 << 20:
            self._advise(file.path, fd, offset + len(out))

    def _advise(self, path: str, fd: int, position: int) -> None:
        """Have the next bytes read; those it was asked for already it would look for again, one page at a time."""
        stop, known = position + _READ_AHEAD, self._advised.get(path, 0)
        start = known if position <= known <= stop else position
        self._advised[path] = stop
        if start < stop:
            advise_soon(fd, start, stop - start)

    def read(self, file: SourceFile, offset: int, nbytes: int) -> bytes:
        """The `nbytes` at `offset`; for headers, whose size the caller has checked against the file's."""
        buffer = bytearray(nbytes)
        self.read_into(file, offset, memoryview(buffer))
        return bytes(buffer)

    def blocks(self, file: SourceFile, block_nbytes: int) -> Iterator[memoryview]:
        """All of a file, in order; each block is valid until the next. Raises as `read_into`."""
        block = memoryview(bytearray(max(0, min(block_nbytes, file.nbytes))))  # a document may say anything
        for start in range(0, file.nbytes, block_nbytes):
            part = block[: file.nbytes - start]
            self.read_into(file, start, part, file.nbytes - start - len(part))
            yield part

    def check_unchanged(self) -> None:
        """Raise `CorruptInput` if a file that was read has changed since its header was."""
        for path, file in self._seen.items():
            fd = self._open.get(path)
            if fd is not None:
                _check_unchanged(file, fd)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_unchanged(file: SourceFile, fd: int) -> None:
    found = os.fstat(fd)
    if (found.st_size, found.st_mtime_ns) != (file.nbytes, file.mtime_ns):
        raise CorruptInput(
            f"{file.shown}: changed while it was being read (expected {file.nbytes} bytes, found {found.st_size})",
            hint="wait until whatever writes it has finished, then run the command again",
        )
