"""Locks on folders in work: one run at a time, and who that is.

    FOLDER/weightops.lock         locked by the run, until it ends in whatever way; says who that is
    FOLDER/weightops.lock.OWNER   where there are no such locks, as on some network file systems: a run by its name

By names alone a run that was killed stays there; so whether it lives is asked for, by host, number and start of its
process. Of another host that cannot be asked, and whoever knows better is told what to remove.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import msgspec

from weightops.errors import Locked
from weightops.io.atomic import write_all
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.owner import Owner
from weightops.io.platform.files import open_to_write, read_at, try_lock
from weightops.io.platform.machine import boot_id, started

LOCK = "weightops.lock"


def is_lock(name: str) -> bool:
    """Whether a lock leaves a file of this name in its folder."""
    return name == LOCK or Owner.parse(name.removeprefix(f"{LOCK}.")) is not None


class Lock:
    """Exclusive hold on a folder."""

    def __init__(self, folder: Path) -> None:
        """Take it; raises `Locked`."""
        self._path = folder / LOCK
        self._name: Path | None = None
        try:
            self._fd = open_to_write(self._path, read=True, append=True)
        except OSError as error:
            raise write_failure(self._path, error) from None
        try:
            self._take()
        except OSError as error:
            self.release()
            raise write_failure(self._path, error) from None
        except BaseException:
            self.release()
            raise

    def _take(self) -> None:
        said = _read(self._fd)
        is_locked = try_lock(self._fd)
        if is_locked is None:
            self._take_by_name(said)
        elif not is_locked or not self._is_linked():
            raise _held(self._path.parent, Holder.parse(said))
        os.ftruncate(self._fd, 0)
        write_all(self._fd, Holder.here().to_bytes())

    def _take_by_name(self, said: bytes) -> None:
        """Of two that come at once each sees the other, and both may yield."""
        here = Holder.here()
        name = self._path.with_name(f"{LOCK}.{here.owner}")
        try:
            fd = open_to_write(name, is_new=True)
        except FileExistsError:
            raise _held(name.parent, here) from None
        try:
            try:
                write_all(fd, here.to_bytes())
            finally:
                os.close(fd)
            for path, holder in ((self._path, Holder.parse(said)), *self._others(name)):
                if holder is not None and not holder.is_gone():
                    raise _held(path.parent, holder, None if holder.can_be_asked else path)
                if path != self._path:
                    path.unlink(missing_ok=True)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
        self._name = name

    def _others(self, own: Path) -> Iterator[tuple[Path, Holder]]:
        for path in own.parent.glob(f"{LOCK}.*"):
            owner = Owner.parse(path.name.removeprefix(f"{LOCK}."))
            if owner is not None and path != own:
                try:
                    said = path.read_bytes()
                except FileNotFoundError:
                    continue
                yield path, Holder.parse(said) or Holder(pid=owner.pid, host="", owner=str(owner))

    def _is_linked(self) -> bool:
        """Whether the locked file still is the one at its path, not one that a finished run has removed."""
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go."""
        if self._fd < 0:
            return
        if self._name is not None:
            os.ftruncate(self._fd, 0)
            self._name.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd, self._name = -1, None

    def remove(self) -> None:
        """Let go of a folder in which nothing else is left, and leave nothing either."""
        try:
            self._path.unlink(missing_ok=True)
        except PermissionError:  # as Windows says of files that are open
            self.release()
            self._path.unlink(missing_ok=True)
        self.release()


class Holder(msgspec.Struct):
    """The process that a lock is of, as it says itself."""

    pid: int
    host: str
    boot: str = ""
    owner: str = ""

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(pid=os.getpid(), host=platform.node(), boot=boot_id(), owner=str(Owner.here()))

    @classmethod
    def parse(cls, said: bytes) -> Self | None:
        """What a process has said of itself, None for anything else."""
        try:
            return msgspec.json.decode(said, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def to_bytes(self) -> bytes:
        """What `parse` reads. It begins with a blank, because Windows lets nobody read the first byte of a lock."""
        return b" " + msgspec.json.encode(self)

    @property
    def can_be_asked(self) -> bool:
        """Whether this process can find out if that one lives: not on another host, nor in another container."""
        owner = Owner.parse(self.owner)
        return self.host == platform.node() if owner is None else owner.is_alive() is not None

    def is_gone(self) -> bool:
        """Whether the process has ended for certain."""
        owner = Owner.parse(self.owner)
        is_alive = owner.is_alive() if owner is not None else None
        if is_alive is not None:
            return not is_alive
        if self.host != platform.node():
            return False
        return self.boot != boot_id() or (owner is None and started(self.pid) is None)


def _read(fd: int) -> bytes:
    buffer = memoryview(bytearray(4096))
    try:
        return bytes(buffer[: read_at(fd, buffer, 0)])
    except PermissionError:
        return bytes(buffer[: read_at(fd, buffer, 1)])


def _held(folder: Path, holder: Holder | None, left: Path | None = None) -> Locked:
    """The error for a lock that a process has; `left` is what it would leave if it had ended without a word."""
    who = "another process"
    if holder is not None:
        who = f"process {holder.pid} on {escape(holder.host) or 'another machine'}"
    hint = "wait for it, or stop it; the same command continues where it stops"
    if left is not None:
        hint = f"wait for it; if it is gone for good, remove {escape(str(left))} and run the same command again"
    return Locked(f"{escape(str(folder))} is being written by {who}", hint=hint)
