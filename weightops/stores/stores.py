"""The places beyond plain paths that a command reads from; who reads which of them is known here alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from weightops.errors import UsageError, WeightopsError
from weightops.io.source_file import SourceFile
from weightops.stores.local import LocalStore
from weightops.stores.places import as_out
from weightops.stores.s3.places import BucketPlace, parse_place

if TYPE_CHECKING:
    from weightops.stores.cache import HubCache
    from weightops.stores.s3.connection import S3
    from weightops.stores.s3.store import S3Store
    from weightops.stores.store import Remote, WritableStore
    from weightops.stores.web.web import Web


def _open_web() -> Remote:
    from weightops.stores.web.web import Web  # imported here because most commands need no network

    return Web()


def _no_cache() -> Remote:
    raise UsageError("there is no cache to read from", hint="give the Stores that the checkpoint was opened with")


def _open_s3() -> Remote:
    from weightops.stores.s3.connection import S3  # imported here because most commands need no bucket

    return S3()


WEB = "web"
BUCKETS = "s3"
_CACHE = "cache"
_KINDS: Mapping[str, Callable[[], Remote]] = {WEB: _open_web, BUCKETS: _open_s3, _CACHE: _no_cache}
"""By kind of place: how to reach it where nobody says how."""
_SCHEMES: Mapping[str, str] = {"http": WEB, "https": WEB, "s3": BUCKETS, "hf-cache": _CACHE}
"""Kinds by what a source file's path begins with."""


class Stores:
    """Connections to places, by kind, each made when it is first needed; shared by the threads of a command.

    `web` is one to servers that is open already, and stays the caller's to close; `connect` makes those that are
    wanted later, in the place of ones with defaults. `cache` is a folder of huggingface_hub's (what HF_HUB_CACHE
    names): what it has of a hub's files is read from there. If `offline`, a repository is what the cache has of it.
    """

    def __init__(
        self,
        web: Remote | None = None,
        connect: Mapping[str, Callable[[], Remote]] = _KINDS,
        *,
        cache: str | os.PathLike[str] | None = None,
        offline: bool = False,
    ) -> None:
        self._connect = {**_KINDS, **connect}
        if cache is not None:
            self._connect[_CACHE] = lambda: _open_cache(cache)
        self._has_cache = cache is not None
        self.offline = offline
        self._open: dict[str, Remote] = {} if web is None else {WEB: web}
        self._lent = frozenset(self._open)
        self._users = 0
        self._lock = threading.Lock()
        self._stopped: WeightopsError | None = None

    @property
    def web(self) -> Web:
        """Connections to hubs and servers; raises what making them raises."""
        return cast("Web", self._remote(WEB))

    @property
    def s3(self) -> S3:
        """Connections to buckets; raises what making them raises."""
        return cast("S3", self._remote(BUCKETS))

    @property
    def cache(self) -> HubCache | None:
        """The cache of a hub's files, if there is to be one."""
        return cast("HubCache", self._remote(_CACHE)) if self._has_cache else None

    def reader_of(self, file: SourceFile) -> Remote:
        """What reads a file that is at no plain path."""
        return self._remote(_SCHEMES[file.scheme])

    def read(self, file: SourceFile) -> bytes:
        """A small file at no plain path, whole; raises as `Remote.read` does."""
        return self.reader_of(file).read(file)

    def writable(self, place: str | os.PathLike[str]) -> WritableStore:
        """The folder at a path or at `s3://bucket/prefix`, to be written to; raises `UsageError` for other places."""
        out = as_out(place)
        return LocalStore(out) if isinstance(out, Path) else self.bucket(parse_place(out))

    def bucket(self, place: BucketPlace) -> S3Store:
        """A folder in a bucket."""
        from weightops.stores.s3.store import S3Store  # imported here because most commands need no bucket

        return S3Store(place.bucket, place.key, self.s3)

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
        """Keep connections for the length of a `with` block; the end of the outermost one closes those made here.

        What interrupted them is over then: a command that failed does not make the next one fail.
        """
        with self._lock:
            self._users += 1
        try:
            yield self
        finally:
            with self._lock:
                self._users -= 1
                is_last = not self._users
                made = [self._open.pop(kind) for kind in self._open.keys() - self._lent] if is_last else []
            for remote in made:
                remote.close()
            if is_last and self._stopped is not None:
                self._stopped = None
                for remote in self._open.values():
                    remote.resume()


def _open_cache(folder: str | os.PathLike[str]) -> Remote:
    from weightops.stores.cache import HubCache  # imported here because most commands read no cache

    return HubCache(folder)
