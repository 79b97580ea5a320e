"""Writing a file of known size past the page cache, where the file system allows it.

The kernel's buffered write costs more than most of our operations, so O_DIRECT into a preallocated file is
the fastest durable way out; where it is refused (tmpfs, some network file systems) writes are buffered.
What can be shared with another file is not written at all.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from weightops.errors import NoRoom, WeightopsError
from weightops.io.escape import escape
from weightops.io.reflink import Extent, share
from weightops.io.source_file import SourceFile

ALIGNMENT = 4096
_BUFFERED_PIECE = 128 << 10
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a file system's largest file is full."""


def aligned_buffer(nbytes: int) -> mmap.mmap:
    """Page-aligned anonymous memory, as direct writes need."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


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
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if resume else os.O_TRUNC)
        try:
            self._fd = os.open(path, flags | os.O_DIRECT, 0o666)
            self._direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise self._failure(error) from None
            self._fd = os.open(path, flags, 0o666)
            self._direct = False
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
        """Take the disk for what is to be written: no more than that, or a file that fits would not."""
        try:
            for start, stop in self._unshared(0, self._nbytes):
                os.posix_fallocate(self._fd, start, stop - start)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise

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
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self._direct = False
        return self._direct

    def _write_all(self, offset: int, block: memoryview) -> None:
        done = 0
        while done < len(block):
            count = os.pwrite(self._fd, block[done:], offset + done)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += count

    def close(self, nbytes: int | None = None) -> None:
        """Cut what alignment added, or to `nbytes` if they turned out to be others, and flush to disk."""
        try:
            os.ftruncate(self._fd, self._nbytes if nbytes is None else nbytes)
            os.fsync(self._fd)
        except OSError as error:
            raise self._failure(error) from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without a promise; for a file that will be thrown away."""
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
    denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    hint = "name a place that you may write to, or make this one so" if denied else None
    return WeightopsError(f"{shown}: cannot be written ({error.strerror})", hint=hint)
