"""Claims that other programs see which fill the same Hugging Face cache: the locks that huggingface_hub takes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from weightops.io.atomic import make_folder
from weightops.io.direct import write_failure
from weightops.stores.transfer.partial import Claim, Claims

_MODE = 0o664
"""Of a lock file, so that others of the group can wait for it; as huggingface_hub's `WeakFileLock` has it."""


class LockedClaims(Claims):
    """Claims of one run, each of which holds a lock file too for as long, if `locks` has one for its key."""

    def __init__(self, out: Path, locks: Mapping[str, Path]) -> None:
        super().__init__(out)
        self._paths = locks
        self._locks: dict[str, BaseFileLock] = {}
        self._guard = threading.Lock()

    def take(self, key: str) -> Claim | None:
        if key not in self._paths:
            return super().take(key)
        lock = _take(self._paths[key])
        if lock is None:
            return None
        try:
            claim = super().take(key)
        except BaseException:
            lock.release()
            raise
        if claim is None:
            lock.release()
            return None
        with self._guard:
            self._locks[key] = lock
        return claim

    def drop(self, key: str) -> None:
        super().drop(key)
        with self._guard:
            lock = self._locks.pop(key, None)
        if lock is not None:
            lock.release()

    def release_all(self) -> None:
        super().release_all()
        with self._guard:
            locks, self._locks = list(self._locks.values()), {}
        for lock in locks:
            lock.release()


def _take(path: Path) -> BaseFileLock | None:
    """The lock, unless somebody has it now."""
    make_folder(path.parent)
    # Not of a thread: a file is begun by one thread, and may be finished by another.
    for kind in (FileLock, SoftFileLock):
        lock = kind(path, timeout=0, mode=_MODE, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        except NotImplementedError:
            continue  # no locks in this file system: one that is the file itself
        except OSError as error:
            raise write_failure(path, error) from None
        return lock
    raise AssertionError("there is always a soft lock")
