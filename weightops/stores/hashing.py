"""Digests of a file whose bytes arrive in order or are read again from disk, git's among them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from weightops.errors import WeightopsError
from weightops.io.digests import new_hasher
from weightops.io.escape import escape
from weightops.io.paths import open_regular

_BLOCK_NBYTES = 1 << 20


class FileHasher:
    """Running digests by several algorithms, over a file of `nbytes` bytes."""

    def __init__(self, algorithms: Iterable[str], nbytes: int) -> None:
        self._hashers = {name: new_hasher(name, nbytes) for name in algorithms}

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        for hasher in self._hashers.values():
            hasher.update(data)

    def digests(self) -> dict[str, str]:
        """The digests so far, in lower-case hexadecimal."""
        return {name: hasher.hexdigest() for name, hasher in self._hashers.items()}


def hash_fetched(path: Path, algorithms: Collection[str], nbytes: int, check: Callable[[], object]) -> dict[str, str]:
    """Digests of a file that has been fetched before; `check` raises in order to stop."""
    hasher = FileHasher(algorithms, nbytes)
    buffer = memoryview(bytearray(_BLOCK_NBYTES))
    with open(open_regular(path), "rb", buffering=0) as file:
        try:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                check()
        except OSError as error:
            raise WeightopsError(f"{escape(str(path))}: cannot be read ({error.strerror})") from None
    return hasher.digests()
