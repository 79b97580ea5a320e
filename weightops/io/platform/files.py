"""Open files: positioned reads and writes, room on disk, what is on it for certain, locks.

Descriptors are never inherited by other programs; Python sees to that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable
from functools import cache
from io import FileIO
from pathlib import Path
from typing import cast

from weightops.io.platform.machine import c_function, file_system_type
from weightops.io.platform.optional import module

_fcntl = module("fcntl")
_BINARY = getattr(os, "O_BINARY", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_DIRECT = getattr(os, "O_DIRECT", 0)
_HAS_PREADV, _HAS_PWRITE = hasattr(os, "preadv"), hasattr(os, "pwrite")
_HAS_FALLOCATE, _HAS_FADVISE = hasattr(os, "posix_fallocate"), hasattr(os, "posix_fadvise")
_FULLFSYNC = getattr(_fcntl, "F_FULLFSYNC", None)
_IN_MEMORY = ("tmpfs", "ramfs")
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE"""
_CANNOT_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_ZEROS = bytes(1 << 20)
_turns = [threading.Lock() for _ in range(64)]
"""By descriptor: for systems on which a place in a file is sought first, and used then."""


def open_to_read(path: Path) -> int:
    """A descriptor for reading; what is no regular file may be refused, and is never waited for."""
    if not _NONBLOCK and not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))
    return os.open(path, os.O_RDONLY | _BINARY | _NONBLOCK)


def open_to_write(
    path: Path, *, is_new: bool = False, keep: bool = True, append: bool = False, read: bool = False, extra: int = 0
) -> int:
    """A descriptor for writing to a file, which is made if it is not there. A link in its place is not followed.

    `is_new` refuses a file that is there with `FileExistsError`; unless `keep`, it is emptied.
    """
    flags = (os.O_RDWR if read else os.O_WRONLY) | os.O_CREAT | _BINARY | _NOFOLLOW | extra
    flags |= (os.O_EXCL if is_new else 0) | (os.O_APPEND if append else 0)
    if _NOFOLLOW:
        return os.open(path, flags | (0 if keep else os.O_TRUNC), 0o666)
    return _open_no_link(path, flags, keep)


def _open_no_link(path: Path, flags: int, keep: bool) -> int:
    """The same where a link has to be looked for: before, and once more when nothing has been changed yet."""
    if os.path.islink(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    fd = os.open(path, flags, 0o666)
    try:
        if not os.path.samestat(os.fstat(fd), os.lstat(path)):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if not keep:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_direct(path: Path, *, keep: bool) -> tuple[int, bool]:
    """As `open_to_write`, past the page cache where system and file system allow it; and whether they do.

    A file system in memory has nothing past it: since Linux 6.6 tmpfs takes the flag, and copies all the same.
    """
    if _DIRECT and file_system_type(path.parent) not in _IN_MEMORY:
        try:
            return open_to_write(path, keep=keep, extra=_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return open_to_write(path, keep=keep), False


def open_direct_to_read(path: Path) -> int:
    """A descriptor for reading past the page cache; `OSError` where system or file system cannot."""
    if not _DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
    return os.open(path, os.O_RDONLY | _DIRECT)


def no_longer_direct(fd: int) -> None:
    """Write by way of the page cache from now on."""
    _fcntl.fcntl(fd, _fcntl.F_SETFL, _fcntl.fcntl(fd, _fcntl.F_GETFL) & ~_DIRECT)


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Read some bytes at `offset`, by any thread; how many, 0 at the end of the file."""
    if _HAS_PREADV:
        return os.preadv(fd, [buffer], offset)
    with _turns[fd % len(_turns)], FileIO(fd, "rb", closefd=False) as file:
        file.seek(offset)
        return file.readinto(buffer) or 0


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write some of the bytes at `offset`, by any thread; how many."""
    if _HAS_PWRITE:
        return os.pwrite(fd, data, offset)
    with _turns[fd % len(_turns)]:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Take the disk for a range of a file, where that can be had without writing it."""
    if _HAS_FALLOCATE:
        try:
            _reserve(fd, offset, nbytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise


def _reserve(fd: int, offset: int, nbytes: int) -> None:
    """Raises `OSError` with one of `_CANNOT_RESERVE` where the file system cannot: glibc's posix_fallocate would
    write a byte into each block there, which on NFS is the file over the wire once more. So the system is asked first.
    """
    call = _fallocate()
    if call is not None and call(fd, _KEEP_SIZE, offset, 1) and ctypes.get_errno() in _CANNOT_RESERVE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.posix_fallocate(fd, offset, nbytes)


@cache
def _fallocate() -> Callable[..., int] | None:
    """fallocate(2) of Linux."""
    call = c_function("fallocate")
    if call is None:
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call.restype = ctypes.c_int
    return cast("Callable[..., int]", call)


def fill(fd: int, nbytes: int) -> None:
    """Make an empty file one of zeros that are all on the disk: nothing written to it later can find that full."""
    if _HAS_FALLOCATE:
        try:
            _reserve(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
    done = 0
    while done < nbytes:
        done += write_at(fd, memoryview(_ZEROS)[: nbytes - done], done)


def taken_nbytes(status: os.stat_result) -> int:
    """Bytes that a file takes on its disk; its size where the system does not tell holes from zeros."""
    return int(status.st_blocks * 512) if hasattr(status, "st_blocks") else status.st_size


def flush(fd: int) -> None:
    """Have what was written on the disk, also after a power cut; macOS asks the disk itself only when it is told to."""
    if _FULLFSYNC is not None:
        try:
            _fcntl.fcntl(fd, _FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(fd)


def advise_in_order(fd: int) -> None:
    """The file will be read from its beginning to its end."""
    if _HAS_FADVISE:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def advise_soon(fd: int, offset: int, nbytes: int) -> None:
    """This range will be read soon."""
    if _HAS_FADVISE:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def try_lock(fd: int) -> bool | None:
    """Have a file for this process alone until it ends, as the system sees to; None where there are no such locks.

    On Windows other processes cannot read the first byte of a locked file.
    """
    try:
        if _fcntl is None:
            # Its Windows lock, LockFileEx; flock is one call, for which the library need not be imported.
            from filelock import lock_descriptor

            return lock_descriptor(fd, blocking=False)
        _fcntl.flock(fd, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _NO_LOCKS else False
    return True


_FICLONERANGE = 0x4020940D
_CLONE = struct.Struct("=qQQQ")
_CANNOT_CLONE = {
    errno.EOPNOTSUPP,  # the file system has no shared blocks
    errno.ENOTTY,  # it does not know the request
    errno.ENOSYS,
    errno.EXDEV,  # two file systems
    errno.EINVAL,  # not whole blocks, or a file that cannot share them
    errno.EBADF,  # what some kernels say of a source that has no shared blocks
    errno.EPERM,
    errno.EACCES,
    errno.EISDIR,
    errno.ETXTBSY,  # a swap file
}


def clone_range(source_fd: int, source_offset: int, target_fd: int, target_offset: int, nbytes: int) -> bool:
    """Let the target share `nbytes` bytes with the source; False if that cannot be, and nothing has changed.

    Both ranges must begin and end at blocks, or end where the files do. The source is open for reading, the target
    for writing. What was in the target is replaced, what lay behind its end stays as it was. Raises `OSError` if the
    disk is full or fails. FICLONERANGE of Linux, see ioctl_ficlonerange(2).
    """
    if not nbytes:
        return True
    if _fcntl is None:
        return False
    argument = _CLONE.pack(source_fd, source_offset, nbytes, target_offset)
    while True:
        try:
            _fcntl.ioctl(target_fd, _FICLONERANGE, argument)
            return True
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno not in _CANNOT_CLONE:
                raise
            return False
