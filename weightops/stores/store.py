"""What a place of files is asked for. A new kind of place is one file that answers this, and a line in `stores`.

`tests/contract` asks the same of every one: what was written is what is read; a name shows nothing or the whole; of two
that create one name, one wins; another content is another identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from weightops.errors import WeightopsError
from weightops.io.reflink import Extent
from weightops.io.source_file import SourceFile

SKIPPED_NBYTES = 1 << 20
"""A gap in a file on a server that is read through on the way to a tensor: that is faster than a new request."""


PROBES = ".weightops/probe-"
"""What the names of files begin with by which it is tried what a store does; one may be left by who was killed."""


class Store(Protocol):
    """Files by name, to be read: a folder on disk or on a server, a repository of a hub.

    Names from indexes and listings are held against `check_relative` wherever one is opened.
    """

    @property
    def shown(self) -> str:
        """Where it is, safe for a terminal."""

    @property
    def name(self) -> str:
        """What the checkpoint in it is called."""

    @property
    def is_near(self) -> bool:
        """Whether reading a small file costs next to nothing."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say about where its files come from, in sentences."""

    def names(self) -> list[str]:
        """What lies directly in it, sorted."""

    def below(self, pattern: str) -> list[str]:
        """The files directly in subfolders whose name matches a glob, as `folder/file`, sorted."""

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, which may be that of one in a subfolder."""

    def identity(self, name: str) -> SourceFile:
        """The file as it is now, to be read by `FileReader`.

        Raises `CorruptInput` for names that leave the store, `SourceMissing`.
        """

    def get(self, name: str) -> bytes:
        """A small file, whole; raises as `identity` does."""


class Target(Protocol):
    """A file that is being written, whole and durable when `close` returns; it has its name when `commit` does."""

    @property
    def shared_nbytes(self) -> int:
        """Bytes that are shared with other files."""

    def write(self, offset: int, block: memoryview, used: int) -> None:
        """The first `used` bytes of `block` at `offset`, which follows what was written before."""

    def close(self, nbytes: int | None = None) -> None:
        """End it, cut to `nbytes` if they turned out to be others."""

    def commit(self) -> None:
        """Give it its name, durably, in the place of what may have that."""

    def abandon(self) -> None:
        """Leave it, without a promise; nothing has its name."""


class WritableStore(Store, Protocol):
    """A store that can be written to. Errors are `NoRoom` and `WeightopsError`, and leave nothing under the name."""

    def probe(self) -> None:
        """Raise `WeightopsError` if `create` would not keep its promise here."""

    def create(self, name: str, data: bytes) -> None:
        """A new file; raises `OutputExists` for a name that is taken, also by whoever takes it at this moment."""

    def put(self, name: str, data: bytes) -> None:
        """A file, in the place of what may have its name."""

    def remove(self, name: str) -> None:
        """Let nothing have this name any more; it may be that nothing has it now."""

    def find(self, name: str) -> bytes | None:
        """A small file, whole; None if nothing has its name."""

    def listed(self, folder: str) -> list[str]:
        """All files in a folder of the store and below it, by their names in the store, sorted; "" is the store."""

    def target(
        self, name: str, nbytes: int, shared: Mapping[SourceFile, Sequence[Extent]] = {}, *, is_most: bool = False
    ) -> Target:
        """A file of `nbytes` bytes to be written piece by piece; ranges of other files it may share where it can.

        Those are to be written all the same. If `is_most`, there may be fewer bytes in the end, and no room is taken
        for them before they come.
        """

    def putting(self, name: str) -> AbstractContextManager[Callable[[bytes], None]]:
        """As `put`, piece by piece: lends a function that takes them."""


class Remote(Protocol):
    """What reads files that are at no plain path by their identity, for all threads of a command."""

    def read_into(self, file: SourceFile, offset: int, out: memoryview, following: int = 0) -> None:
        """Fill `out` with the bytes at `offset`; `following` ones will be wanted next."""

    def read(self, file: SourceFile) -> bytes:
        """A small file, whole, held against its digest."""

    def proven_nbytes(self, file: SourceFile) -> int:
        """How many bytes from the beginning on a digest has followed."""

    def is_proven(self, file: SourceFile) -> bool:
        """Whether all of the file has passed, and its digest was right."""

    def forget(self, file: SourceFile) -> None:
        """Begin anew with a file, as when another run reads it."""

    def interrupt(self, error: WeightopsError) -> None:
        """Make all that waits or reads, now or later, raise `error`; safe in a signal handler."""

    def resume(self) -> None:
        """Read again after an interruption, which nobody waits or reads under any more."""

    def close(self) -> None:
        """Let go of connections."""
