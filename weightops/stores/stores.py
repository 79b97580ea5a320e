"""The places beyond this machine that a command reads from; who reads which of them is known here alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from weightops.errors import WeightopsError
from weightops.io.source_file import SourceFile

if TYPE_CHECKING:
    from weightops.stores.store import Remote
    from weightops.stores.web.web import Web


def _open_web() -> Remote:
    from weightops.stores.web.web import Web  # imported here because most commands need no network

    return Web()


WEB = "web"
_KINDS: Mapping[str, Callable[[], Remote]] = {WEB: _open_web}
"""By kind of place: how to reach it where nobody says how."""
_SCHEMES: Mapping[str, str] = {"http": WEB, "https": WEB}
"""Kinds by what a source file's path begins with."""


class Stores:
    """Connections to places, by kind, each made when it is first needed; shared by the threads of a command.

    `web` is one to servers that is open already, and stays the caller's to close; `connect` makes those that are
    wanted later, in the place of ones with defaults.
    """

    def __init__(self, web: Remote | None = None, connect: Mapping[str, Callable[[], Remote]] = _KINDS) -> None:
        self._connect = {**_KINDS, **connect}
        self._open: dict[str, Remote] = {} if web is None else {WEB: web}
        self._lock = threading.Lock()
        self._stopped: WeightopsError | None = None

    @property
    def web(self) -> Web:
        """Connections to hubs and servers; raises what making them raises."""
        return cast("Web", self._remote(WEB))

    def reader_of(self, file: SourceFile) -> Remote:
        """What reads a file that is not on this machine."""
        return self._remote(_SCHEMES[file.scheme])

    def _remote(self, kind: str) -> Remote:
        with self._lock:
            if kind not in self._open:
                self._open[kind] = self._connect[kind]()
                if self._stopped is not None:
                    self._open[kind].interrupt(self._stopped)
            return self._open[kind]

    def is_proven(self, file: SourceFile) -> bool:
        """Whether the file has passed whole, and its digest was right; see `Remote`."""
        return file.is_remote and self.reader_of(file).is_proven(file)

    def forget(self, file: SourceFile) -> None:
        """Begin anew with a file, as when another run reads it."""
        if file.is_remote and _SCHEMES[file.scheme] in self._open:
            self.reader_of(file).forget(file)

    def interrupt(self, error: WeightopsError) -> None:
        """Make all that waits or reads, now or later, raise `error`; safe in a signal handler."""
        self._stopped = self._stopped or error
        for remote in list(self._open.values()):
            remote.interrupt(error)

    @contextmanager
    def connected(self) -> Iterator[Stores]:
        """Close, at the end of a `with` block, the connections that were made in it."""
        before = set(self._open)
        try:
            yield self
        finally:
            for kind in self._open.keys() - before:
                self._open.pop(kind).close()
