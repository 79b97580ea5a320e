"""Writing a file of known size past the page cache, where the file system allows it.

The kernel's buffered write costs more than most of our operations, so O_DIRECT into a preallocated file is
the fastest durable way out; where it is refused (tmpfs, some network file systems) or not known (macOS, Windows)
writes are buffered.
What can be shared with another file is not written at all.
"""

from __future__ import annotations

import errno
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from weightops.errors import NoRoom, WeightopsError
from weightops.io.escape import escape
from weightops.io.platform.files import allocate, flush, no_longer_direct, open_direct, taken_nbytes, write_at
from weightops.io.platform.names import is_too_long
from weightops.io.reflink import Extent, share
from weightops.io.source_file import SourceFile

ALIGNMENT = 4096
_BUFFERED_PIECE = 1 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a file system's largest file is full."""


class DirectFile:
    """A file of `nbytes` bytes, written in aligned blocks in any order; on disk once `close` returns.

    What is there already is kept if `resume` says so. Of what other files hold, by `shared`, the blocks are shared
    where the file system can; `write` must be given those bytes all the same, and passes over them.
    Raises `NoRoom` as soon as the disk cannot hold the file, whose mode follows the umask.
    """

    def __init__(
        self,
        path: Path,
        nbytes: int,
        *,
        resume: bool = False,
        shared: Mapping[SourceFile, Sequence[Extent]] = {},
    ) -> None:
        self._path = path
        self._nbytes = nbytes
        self._shared: list[tuple[int, int]] = []
        try:
            self._fd, self._direct = open_direct(path, keep=resume)
        except OSError as error:
            raise self._failure(error) from None
        try:
            self._share(shared)
            self._allocate()
        except OSError as error:
            self.abandon()
            raise self._failure(error) from None
        except BaseException:
            self.abandon()
            raise

    def _share(self, shared: Mapping[SourceFile, Sequence[Extent]]) -> None:
        for source, extents in shared.items():
            done = share(source, extents, self._fd)
            self._shared += [(extent.target_offset, extent.target_offset + extent.nbytes) for extent in done]
        self._shared.sort()

    def _allocate(self) -> None:
        """Take the disk for what is to be written: no more than that, or a file that fits would not.

        Of buffered files only the room is looked at: tmpfs would write zeros, in a third of the time of a copy.
        """
        ranges = list(self._unshared(0, self._nbytes))
        if self._direct:
            for start, stop in ranges:
                allocate(self._fd, start, stop - start)
        elif sum(stop - start for start, stop in ranges) > self._room():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _room(self) -> int:
        """What the file may take: what is free, and what it has already."""
        return shutil.disk_usage(self._path.parent).free + taken_nbytes(os.fstat(self._fd))

    @property
    def shared_nbytes(self) -> int:
        """Bytes that are shared with other files."""
        return sum(stop - start for start, stop in self._shared)

    def _unshared(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """What of a range is to be written. Shared ranges are aligned, so these begin and end so, or with the range."""
        for i in range(max(0, bisect_right(self._shared, (start, start)) - 1), len(self._shared)):
            begin, end = self._shared[i]
            if begin >= stop:
                break
            if start < begin:
                yield start, begin
            start = max(start, end)
        if start < stop:
            yield start, stop

    def write(self, offset: int, block: memoryview, used: int) -> None:
        """Write the first `used` bytes of `block` at `offset`; both aligned, and `block` at least up to alignment."""
        try:
            for start, stop in self._unshared(offset, offset + used):
                self._write(start, block[start - offset :], stop - start)
        except OSError as error:
            raise self._failure(error) from None

    def _write(self, offset: int, block: memoryview, used: int) -> None:
        if self._direct and self._write_direct(offset, block[: -(-used // ALIGNMENT) * ALIGNMENT]):
            return
        for start in range(0, used, _BUFFERED_PIECE):
            self._write_all(offset + start, block[start : min(start + _BUFFERED_PIECE, used)])

    def _write_direct(self, offset: int, block: memoryview) -> bool:
        try:
            self._write_all(offset, block)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            no_longer_direct(self._fd)
            self._direct = False
        return self._direct

    def _write_all(self, offset: int, block: memoryview) -> None:
        done = 0
        while done < len(block):
            count = write_at(self._fd, block[done:], offset + done)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += count

    def close(self, nbytes: int | None = None) -> None:
        """Cut what alignment added, or to `nbytes` if they turned out to be others, and flush to disk."""
        try:
            os.ftruncate(self._fd, self._nbytes if nbytes is None else nbytes)
            flush(self._fd)
        except OSError as error:
            raise self._failure(error) from None
        finally:
            self._release()

    def abandon(self) -> None:
        """Close without a promise; for a file that will be thrown away."""
        self._release()

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _failure(self, error: OSError) -> WeightopsError:
        return write_failure(self._path, error)


def write_failure(path: Path, error: OSError) -> WeightopsError:
    """The error for a write that the system refused: no room, or else what it says."""
    shown = escape(str(path))
    if error.errno in NO_ROOM:
        return NoRoom(
            f"{shown}: the disk is full ({error.strerror})",
            hint="make room and run the same command again: it continues",
        )
    hint = None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "name a place that you may write to, or make this one so"
    elif is_too_long(path):
        hint = "choose a shorter --out: this system has no paths of that length, unless it is told to"
    return WeightopsError(f"{shown}: cannot be written ({error.strerror})", hint=hint)
