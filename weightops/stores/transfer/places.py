"""What stands in the folder of a download: whose it is, and files that get their names there, replacing no others."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from weightops.errors import CorruptInput, OutputExists
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.platform.entries import folder_below, is_link, is_real_folder
from weightops.stores.transfer.partial import STATE, key_of
from weightops.stores.web.listing import RemoteFile

Stamp = tuple[int, int, int]
"""A file's inode, modification time in ns and size: as long as they are the same, so is the file."""


def note_of(out: Path, name: str) -> Path:
    """Where a download notes that a file is there."""
    return out / STATE / f"{key_of(name)}.done"


class _Note(msgspec.Struct):
    """By what a note tells the file that was brought."""

    inode: int
    mtime_ns: int
    nbytes: int


def was_brought(out: Path, name: str) -> bool:
    """Whether the very file that stands there was brought by a download that has not ended."""
    try:
        note = msgspec.json.decode(note_of(out, name).read_bytes(), type=_Note)
    except (OSError, msgspec.MsgspecError):
        return False
    return (note.inode, note.mtime_ns, note.nbytes) == stamp_of(out / name)


def other_there(path: Path) -> OutputExists:
    """The error for a file that no download brought and that is not the one wanted."""
    return OutputExists(
        f"{escape(str(path))} is there: no download brought it, and it is not the file that is wanted",
        hint="move it away, choose another --out, or give --overwrite to replace it",
    )


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of what stands at `path`, not following links; None if nothing does."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def check_place(root: Path, name: str) -> None:
    """Refuse a name under which a link, or something other than a file, stands already, or below which lies one."""
    *parents, _ = parts = name.split("/")
    for i in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:i])
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise write_failure(path, error) from None
        expected = is_real_folder(status) if i <= len(parents) else stat.S_ISREG(status.st_mode)
        if not expected:
            what = "a link" if is_link(path) else "no folder" if i <= len(parents) else "no file"
            raise CorruptInput(f"{escape(str(path))} is {what}, so {escape(name)} cannot be written there")


def move_into(root: Path, name: str, source: Path, *, may_replace: bool = True) -> None:
    """Rename `source` to `root/name`, durably, making folders and following no links.

    Unless it `may_replace`, raises `OutputExists` for what is there.
    """
    *parents, base = name.split("/")
    try:
        with folder_below(root, parents) as folder:
            if may_replace:
                folder.replace(source, base)
            else:
                folder.give(source, base)
                source.unlink(missing_ok=True)
            folder.flush()
    except FileExistsError:
        raise other_there(root / name) from None
    except OSError as error:
        raise write_failure(root / name, error) from None


def refuse_other(out: Path, file: RemoteFile, ours: frozenset[str]) -> None:
    """Raise `OutputExists` if what stands in a file's place is not ours and cannot be that file, as far as sizes tell.

    One of the right size is compared when its turn comes (`Transfer`), and kept if it is the same.
    """
    path = out / file.name
    if file.name in ours or not os.path.lexists(path) or was_brought(out, file.name):
        return
    if not file.digests or file.nbytes not in (None, path.lstat().st_size):
        raise other_there(path)
