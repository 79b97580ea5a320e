"""Files and folders that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape as escape_glob
from pathlib import Path

from weightops.errors import OutputExists, UsageError
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.owner import Owner
from weightops.io.platform.entries import flush_folder, give_name, is_read_only, replace_file
from weightops.io.platform.files import flush, open_to_write


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    try:
        flush_folder(folder)
    except OSError as error:
        raise write_failure(folder, error) from None


def publish(temporary: Path, final: Path) -> None:
    """Give a finished, flushed file its name, durably. Both are in the same folder."""
    try:
        replace_file(temporary, final)
    except OSError as error:
        raise write_failure(final, error) from None
    fsync_folder(final.parent)


_TEMPORARY = re.compile(r"(.*/)?\.([^/]+)\.([0-9a-f]{12}-\d+-\d+)-[0-9a-f]{8}\.tmp", re.DOTALL)


def temporary_of(name: str) -> str:
    """What a file is called while this process writes it: like no other's, for two may write one file at a time."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}.{last}.{Owner.here()}-{secrets.token_hex(4)}.tmp"


def final_of(name: str) -> str | None:
    """What the file will be called that has this name while a process writes it; None for names of other kinds."""
    match = _TEMPORARY.fullmatch(name)
    return f"{match[1] or ''}{match[2]}" if match else None


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file: temporary name, flush, rename, flush the folder."""
    with writing_whole(path) as write:
        write(data)


def write_new(path: Path, data: bytes) -> None:
    """As `write_whole`, for a name that nothing has; raises `OutputExists`, also if something takes it meanwhile."""
    temporary = path.with_name(temporary_of(path.name))
    try:
        with removed_at_end(temporary):
            with _writing(path, temporary) as write:
                write(data)
            give_name(temporary, path)
            fsync_folder(path.parent)
    except FileExistsError:
        raise OutputExists(f"{escape(str(path))} exists", hint="it is left alone: choose another name") from None
    except OSError as error:
        raise write_failure(path, error) from None


def remove_left(path: Path) -> None:
    """Remove what processes that have ended for certain have left of a file that they were writing."""
    for found in path.parent.glob(f".{escape_glob(path.name)}.*.tmp"):
        match = _TEMPORARY.fullmatch(found.name)
        owner = Owner.parse(match[3]) if match is not None and match[2] == path.name else None
        if owner is not None and owner.is_alive() is False:
            with suppress(OSError):
                found.unlink()


@contextmanager
def removed_at_end(temporary: Path) -> Iterator[None]:
    """Remove a temporary file at the end, if it is still there."""
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(temporary)


@contextmanager
def writing_whole(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Lend a function that writes a file piece by piece; it gets its name, durably, when all is well at the end."""
    temporary = path.with_name(temporary_of(path.name))
    with _writing(path, temporary) as write:
        yield write
    publish(temporary, path)


@contextmanager
def _writing(path: Path, temporary: Path) -> Iterator[Callable[[bytes], None]]:
    """Lend a function that writes what `path` will hold; it is flushed at the end, and removed after an error."""
    try:
        fd = open_to_write(temporary, is_new=True)
    except OSError as error:
        raise write_failure(path, error) from None

    def write(data: bytes) -> None:
        try:
            write_all(fd, data)
        except OSError as error:
            raise write_failure(path, error) from None

    try:
        try:
            yield write
            flush(fd)
        except OSError as error:
            raise write_failure(path, error) from None
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, unless they are there; durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise write_failure(path, error) from None
    fsync_folder(path.parent)


def check_folder(path: Path) -> None:
    """Refuse a folder in which nothing could be written, or that could not be made."""
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise write_failure(path, OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        reason = errno.EROFS if is_read_only(there) else errno.EACCES
        raise write_failure(path, OSError(reason, os.strerror(reason)))


def check_target(path: Path) -> None:
    """Refuse a file that `write_whole` could not write, or should not: before the work whose result it is to hold."""
    shown = escape(str(path))
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{shown}: there is no such folder to write it to", hint="make it first")
    if os.path.lexists(path) and not path.is_file():
        raise UsageError(f"{shown} is no regular file, and is not replaced", hint="name another file")
    check_folder(path.absolute().parent)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
