"""A file on its way to another place: which bytes, proven once, and read again as often as they are sent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from weightops.errors import CorruptInput
from weightops.io.escape import escape
from weightops.io.paths import open_regular

_BLOCK_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file of `nbytes` bytes with these digests: at `path`, since `mtime_ns`, or else `data`."""

    name: str
    nbytes: int
    digests: Mapping[str, str]
    path: Path | None = None
    mtime_ns: int = 0
    data: bytes = b""

    @property
    def sha256(self) -> str:
        return self.digests["sha256"]

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes from `start` to before `stop`, or to the end; each block is valid until the next.

        Raises `CorruptInput` if the file is not what it was, as is told by its size and date before and after.
        """
        stop = self.nbytes if stop is None else stop
        if self.path is None:
            yield memoryview(self.data)[start:stop]
            return
        buffer = memoryview(bytearray(max(1, min(stop - start, _BLOCK_NBYTES))))
        with open(open_regular(self.path), "rb", buffering=0) as file:
            self._check(file)
            file.seek(start)
            while start < stop:
                count = file.readinto(buffer[: stop - start])
                if not count:
                    raise self._changed()
                yield buffer[:count]
                start += count
            self._check(file)

    def read(self, nbytes: int | None = None) -> bytes:
        """The first `nbytes` bytes, or all of them."""
        return b"".join(map(bytes, self.blocks(0, None if nbytes is None else min(nbytes, self.nbytes))))

    def _check(self, file: FileIO) -> None:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.nbytes, self.mtime_ns):
            raise self._changed()

    def _changed(self) -> CorruptInput:
        return CorruptInput(
            f"{escape(str(self.path))}: changed after it was verified",
            hint="wait until whatever writes it has finished, then run the command again",
        )
