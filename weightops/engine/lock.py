"""Locks on folders in work: one run at a time, and who that is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from pathlib import Path

from weightops.errors import Locked
from weightops.io.atomic import write_all
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.owner import boot_id


def take_lock(path: Path) -> int:
    """An exclusive lock on `path`, let go by the kernel when this process ends; raises `Locked`.

    Where the file system has no locks, the process named in the file is asked for instead.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise write_failure(path, error) from None
    holder = os.pread(fd, 4096, 0)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except OSError as error:
        no_locks = error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
        held = not no_locks or _is_alive(holder)
    if held or not _is_linked(fd, path):
        os.close(fd)
        raise Locked(
            f"{escape(str(path.parent))} is being written by {_describe(holder)}",
            hint="wait for it, or stop it; the same command continues where it stops",
        )
    try:
        os.ftruncate(fd, 0)
        write_all(fd, json.dumps({"pid": os.getpid(), "host": platform.node(), "boot": boot_id()}).encode())
    except OSError as error:
        os.close(fd)
        raise write_failure(path, error) from None
    return fd


def _is_linked(fd: int, path: Path) -> bool:
    """Whether the locked file still is the one at `path`, not one that a finished run has removed."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _is_alive(holder: bytes) -> bool:
    try:
        found = json.loads(holder)
        if found["host"] != platform.node():
            return True
        if found["boot"] != boot_id():
            return False
        os.kill(int(found["pid"]), 0)
    except (ValueError, KeyError, TypeError, RecursionError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _describe(holder: bytes) -> str:
    try:
        found = json.loads(holder)
        return f"process {int(found['pid'])} on {escape(str(found['host']))}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
