"""Proof that what was read of files elsewhere is what they should hold: digests that follow the bytes as they pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from weightops.errors import Differs
from weightops.io.source_file import SourceFile
from weightops.stores.hashing import FileHasher


@dataclass
class _Running:
    """The digest of a file's first `position` bytes."""

    algorithm: str
    hasher: FileHasher
    position: int = 0
    proven: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Proofs:
    """How far the bytes of files have passed in order, and whether their digests came out right; for all threads.

    A digest takes bytes in their order only: those that pass again are not looked at, those that pass before their
    turn do not count. `hint` says what to do about a file whose digest is wrong.
    """

    def __init__(self, hint: Callable[[SourceFile], str]) -> None:
        self._hint = hint
        self._running: dict[SourceFile, _Running] = {}
        self._lock = threading.Lock()

    def _of(self, file: SourceFile) -> _Running:
        with self._lock:
            if file not in self._running:
                algorithm = file.digest.partition(":")[0]
                self._running[file] = _Running(algorithm, FileHasher([algorithm], file.nbytes))
            return self._running[file]

    def position(self, file: SourceFile) -> int:
        """How many bytes from the beginning on have passed in order."""
        return self._of(file).position if file.digest else 0

    def is_proven(self, file: SourceFile) -> bool:
        """Whether all of the file has passed, and its digest was right."""
        return bool(file.digest) and self._of(file).proven

    def passed(self, file: SourceFile, start: int, data: bytes | memoryview) -> None:
        """Take note of bytes that were read; raises `Differs` if they are the file's last, and its digest is wrong."""
        if not file.digest:
            return
        running = self._of(file)
        with running.lock:
            known = running.position - start
            if not 0 <= known < len(data):
                return
            running.hasher.update(memoryview(data)[known:])
            running.position = start + len(data)
            if running.position == file.nbytes:
                try:
                    self._conclude(file, running)
                except Differs:
                    self.forget(file)  # or nothing would be left to read of it, and to find wrong again
                    raise

    def whole(self, file: SourceFile, data: bytes | bytearray) -> None:
        """Hold a file that was read at one time, whole; raises `Differs`. Nothing is noted of it."""
        algorithm = file.digest.partition(":")[0]
        running = _Running(algorithm, FileHasher([algorithm], file.nbytes))
        running.hasher.update(memoryview(data))
        self._conclude(file, running)

    def _conclude(self, file: SourceFile, running: _Running) -> None:
        found = f"{running.algorithm}:{running.hasher.digests()[running.algorithm]}"
        running.proven = found == file.digest
        if not running.proven:
            raise Differs(
                f"{file.shown}: {running.algorithm} is {found.partition(':')[2]}, "
                f"expected {file.digest.partition(':')[2]}",
                hint=self._hint(file),
            )

    def forget(self, file: SourceFile) -> None:
        """Begin anew with a file, as when another run reads it."""
        with self._lock:
            self._running.pop(file, None)
