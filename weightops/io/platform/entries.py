"""What stands in folders: names that are given, exchanged and taken away, and links that are not followed.

A name that somebody else may have taken is given by a call that cannot replace: of Linux and macOS a link or a rename
that is told so, of Windows any rename.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from weightops.io.platform.machine import c_function

_DIRECTORY, _NOFOLLOW = getattr(os, "O_DIRECTORY", 0), getattr(os, "O_NOFOLLOW", 0)
_HAS_DIR_FD = bool(_DIRECTORY and _NOFOLLOW and {os.open, os.mkdir, os.rename, os.link} <= os.supports_dir_fd)
_IS_WINDOWS = os.name == "nt"
"""Where renames replace nothing, and what is open, here or in another process, can be neither renamed nor removed."""
_JUNCTION = 0xA0000003
"""IO_REPARSE_TAG_MOUNT_POINT: a folder on Windows that is really another one."""
_WAITS_S = (0.01, 0.05, 0.2, 0.5)
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)

_NO_SYMBOLIC = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_PRIVILEGE = 1314
"""ERROR_PRIVILEGE_NOT_HELD."""


def is_link(path: Path) -> bool:
    """Whether a link stands there, to whatever: also a junction, which Python takes for a folder."""
    try:
        return _is_link(os.lstat(path))
    except (OSError, ValueError):
        return False


def is_real_folder(status: os.stat_result) -> bool:
    """Whether what `os.lstat` looked at is a folder, and no link to one."""
    return stat.S_ISDIR(status.st_mode) and not _is_link(status)


def _is_link(status: os.stat_result) -> bool:
    return stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) == _JUNCTION


def is_read_only(folder: Path) -> bool:
    """Whether the whole file system can only be read; False where that cannot be asked."""
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows has no call for that, and writes them in the order of the changes."""
    if not _DIRECTORY:
        return
    fd = os.open(folder, os.O_RDONLY | _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(source: Path, target: Path) -> None:
    """Rename a file, in the place of one that may be there, in one step."""
    _patiently(lambda: os.replace(source, target))


def rename(source: Path, target: Path) -> None:
    """Rename a folder to a name that is free or that of an empty folder; a file to one that is free.

    Raises `OSError` with one of the numbers in `TAKEN` for a folder's name that is neither.
    """
    if _IS_WINDOWS and not is_link(target) and os.path.isdir(target):
        os.rmdir(target)  # refuses one that is not empty
    _patiently(lambda: os.rename(source, target))


TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
"""What systems say of a name that something has."""


def _patiently(act: Callable[[], None]) -> None:
    """Where what is open cannot be renamed, wait for those who look at files that have just appeared to be done."""
    for wait_s in _WAITS_S if _IS_WINDOWS else ():
        try:
            return act()
        except PermissionError:
            time.sleep(wait_s)
    return act()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that is known to be no link: open where folders can be, so that it stays this one; else a path."""

    path: Path
    fd: int | None = None

    def give(self, source: Path, name: str) -> None:
        """Give a file this name here, unless anything has it: then `FileExistsError`.

        Whether it keeps its old name too depends on the system.
        """
        if _IS_WINDOWS:
            _patiently(lambda: os.rename(source, self._at(name)))
            return
        try:
            if self.fd is None:
                os.link(source, self._at(name))
            else:
                os.link(source, name, dst_dir_fd=self.fd, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError as error:
            if self._has(name):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path / name)) from None
            if error.errno not in _NO_LINKS:
                raise
            if not self._rename_new(source, name):
                self._take_and_replace(source, name)

    def replace(self, source: Path, name: str) -> None:
        """Give a file this name here, in the place of one that may be there, in one step."""
        _patiently(lambda: os.replace(source, self._at(name), dst_dir_fd=self.fd))

    def flush(self) -> None:
        """Make the names in it durable."""
        if self.fd is None:
            flush_folder(self.path)
        else:
            os.fsync(self.fd)

    def _at(self, name: str) -> str | Path:
        return self.path / name if self.fd is None else name

    def _has(self, name: str) -> bool:
        try:
            os.stat(self._at(name), dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _take_and_replace(self, source: Path, name: str) -> None:
        """Without links and such renames: an empty file takes the name, which nobody else can take then."""
        os.close(os.open(self._at(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=self.fd))
        try:
            self.replace(source, name)
        except OSError:
            os.unlink(self._at(name), dir_fd=self.fd)
            raise

    def _rename_new(self, source: Path, name: str) -> bool:
        """A rename that is told to replace nothing; False where there is none. Raises `FileExistsError`."""
        number = _rename_at(source, None, self._at(name), self.fd, _NOREPLACE)
        if number == errno.EEXIST:
            raise FileExistsError(number, os.strerror(number), str(self.path / name))
        return number == 0


@contextmanager
def folder_below(root: Path, names: Sequence[str]) -> Iterator[Folder]:
    """A folder below `root`, made if it is not there, durably. Below `root`, no link is followed.

    Raises `NotADirectoryError` or an `OSError` of ELOOP for what is no folder.
    """
    with ExitStack() as stack:
        folder = _open_folder(Folder(root), None, stack)
        for name in names:
            with suppress(FileExistsError):
                os.mkdir(folder._at(name), dir_fd=folder.fd)
                folder.flush()
            folder = _open_folder(folder, name, stack)
        yield folder


def _open_folder(outer: Folder, name: str | None, stack: ExitStack) -> Folder:
    path = outer.path if name is None else outer.path / name
    if not _HAS_DIR_FD:
        if not (os.path.isdir(path) if name is None else is_real_folder(os.lstat(path))):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return Folder(path)
    flags = os.O_RDONLY | _DIRECTORY | (0 if name is None else _NOFOLLOW)
    fd = os.open(path if name is None else name, flags, dir_fd=outer.fd)
    stack.callback(os.close, fd)
    return Folder(path, fd)


def give_name(source: Path, target: Path) -> None:
    """`Folder.give`, by path."""
    Folder(target.parent).give(source, target.name)


def make_link(path: Path, target: Path) -> bool:
    """Make a symbolic link to `target`, which counts from the link's folder; False where there are none.

    Raises `FileExistsError`, and `OSError`. Windows has them for administrators and developers only.
    """
    try:
        os.symlink(target, path)
    except NotImplementedError:
        return False
    except OSError as error:
        if error.errno in _NO_SYMBOLIC or getattr(error, "winerror", None) == _NO_PRIVILEGE:
            return False
        raise
    return True


def exchange(first: Path, second: Path) -> bool:
    """Swap two existing paths in one step; False where system or file system cannot."""
    return _rename_at(first, None, second, None, _EXCHANGE) == 0


_NOREPLACE, _EXCHANGE = 0, 1
_RENAMES = {"renameat2": (-100, (1, 2)), "renameatx_np": (-2, (4, 2))}
"""Linux's call and that of macOS: what they call the working folder, and their flags for the two."""


def _rename_at(source: Path, source_fd: int | None, target: str | Path, target_fd: int | None, what: int) -> int:
    """The error number of a rename with a flag, 0 if it is done."""
    for name, (here, flags) in _RENAMES.items():
        rename = c_function(name)
        if rename is not None:
            at = [here if fd is None else fd for fd in (source_fd, target_fd)]
            done = rename(at[0], os.fsencode(source), at[1], os.fsencode(target), flags[what])
            return 0 if done == 0 else ctypes.get_errno() or errno.EIO
    return errno.ENOSYS
