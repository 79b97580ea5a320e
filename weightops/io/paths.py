"""Paths: names from strangers stay inside their folder, and only regular files are opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Literal

from weightops.errors import CorruptInput, SourceMissing, WeightopsError
from weightops.io.escape import escape, is_harmless
from weightops.io.platform.files import open_to_read
from weightops.io.platform.names import folds_case, is_too_long, taken_for_one, why_refused

_TEMPORARY = ".partial"


def check_relative(name: str, what: str) -> str:
    """Return `name` if it is a plain relative POSIX path below its folder; else raise `CorruptInput`."""
    parts = name.split("/")
    bad = (
        not name
        or len(name) > 1024
        or "\\" in name
        or name.startswith("/")
        or any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts)
        or (len(parts[0]) > 1 and parts[0][1] == ":")
        or not is_harmless(name)
    )
    if bad:
        raise CorruptInput(f"{what}: the file name {escape(name)!r} is not a plain path inside the folder")
    return name


def check_names(folder: Path, names: Collection[str], what: str) -> None:
    """Refuse files that cannot lie together in a folder, which may still have to be made.

    Raises `CorruptInput` for names that the system does not have, and for those that are one to a file system to which
    case makes no difference; `WeightopsError` for a path that becomes too long.
    """
    for name in names:
        _check_holdable(name, what)
        if is_too_long(folder / name):
            shown = escape(str(folder / name))
            raise WeightopsError(
                f"{shown}: cannot be written (the path is too long for this system)", hint="choose a shorter --out"
            )
    alike = taken_for_one(sorted(names))
    if alike is not None and folds_case(folder):
        one, other = map(escape, alike)
        raise CorruptInput(
            f"{what}: {one!r} and {other!r} differ in case only, and are one where they are to be written",
            hint="choose an --out on a file system that tells them apart",
        )


def _check_holdable(name: str, what: str) -> None:
    reason = why_refused(name)
    if reason is not None:
        raise CorruptInput(f"{what}: the file name {escape(name)!r} cannot be used on this system: {reason}")


def inside(root: Path, name: str, what: str) -> Path:
    """Resolve `name` below `root`, following symbolic links only as far as they stay inside.

    The snapshot folders of the Hugging Face cache link to blobs beside them; those count as inside.
    """
    path = root / check_relative(name, what)
    _check_holdable(name, what)
    real_root = Path(os.path.realpath(root))
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(_trusted_root(real_root)):
        raise CorruptInput(
            f"{what}: {escape(name)!r} is a link that leaves the folder {escape(str(root))}",
            hint="name the folder that really holds the file, or copy the file",
        )
    return path


def _trusted_root(root: Path) -> Path:
    """The cache folder when `root` is a snapshot in a Hugging Face cache, else `root` itself."""
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        return root.parent.parent.parent
    return root


def files_below(folder: Path, unreadable: Callable[[str, OSError], None]) -> Iterator[str]:
    """Names, relative to `folder`, of the files in it and its subfolders; links are listed and not followed.

    Hidden files and folders, and folders of partial outputs, are passed over. `unreadable` is told of subfolders that
    cannot be searched.
    """

    def is_passed(prefix: str, entry: os.DirEntry[str]) -> bool:
        is_partial = entry.name.endswith(_TEMPORARY) and entry.is_dir(follow_symlinks=False)
        return entry.name.startswith(".") or is_partial

    return (name for name, _ in _walk(folder, is_passed, unreadable))


EntryKind = Literal["file", "link", "linked folder", "other"]


def entries_below(
    folder: Path, skipped: Collection[str], unreadable: Callable[[str, OSError], None]
) -> Iterator[tuple[str, EntryKind]]:
    """As `files_below`, but nothing is passed over save the entries of `folder` itself in `skipped`.

    A link is one to a file, or to a folder, which is not searched; what is neither file nor folder is something else.
    """

    def is_passed(prefix: str, entry: os.DirEntry[str]) -> bool:
        return not prefix and entry.name in skipped

    return ((name, _kind(entry)) for name, entry in _walk(folder, is_passed, unreadable))


def _walk(
    folder: Path, is_passed: Callable[[str, os.DirEntry[str]], bool], unreadable: Callable[[str, OSError], None]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Whatever is in a folder and its subfolders but folders, by its name from there."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(folder / prefix) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            unreadable(prefix, error)
            continue
        for entry in entries:
            if is_passed(prefix, entry):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry


def _kind(entry: os.DirEntry[str]) -> EntryKind:
    try:
        if entry.is_file():
            return "link" if entry.is_symlink() else "file"
        return "linked folder" if entry.is_dir() else "other"
    except OSError:
        return "other"  # a link in a circle


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor; never blocks on a FIFO or device.

    Raises `SourceMissing` when there is no such file, `CorruptInput` when it is not a regular file.
    """
    shown = escape(str(path))
    try:
        fd = open_to_read(path)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceMissing(f"{shown}: no such file") from None
    except ValueError:  # a NUL in it
        raise CorruptInput(f"{shown}: not the path of a file") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO) or os.path.isdir(path):
            raise CorruptInput(f"{shown}: not a regular file") from None
        raise WeightopsError(f"{shown}: cannot be opened ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptInput(f"{shown}: not a regular file")
    return fd
