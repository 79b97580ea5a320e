"""Files that somebody lists, on servers or in a cache, as a folder to open a checkpoint from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase

from weightops.errors import SourceMissing, UsageError
from weightops.io.escape import escape
from weightops.io.paths import check_relative
from weightops.io.source_file import SourceFile
from weightops.stores.stores import Stores
from weightops.stores.web.listing import Listing, RemoteFile

_PREFERRED = ("sha256", "git_sha1", "sha512", "blake2b", "xxh3_128", "md5", "sha1", "xxh64", "xxh3_64", "b3")


class ListedStore:
    """Files by name, each where `locate` says, read through `stores`."""

    is_near = False

    def __init__(
        self,
        listing: Listing,
        locate: Callable[[RemoteFile], SourceFile],
        stores: Stores,
        notes: Collection[str] = (),
    ) -> None:
        self.shown = listing.source
        self.name = f"{listing.source}@{listing.commit}" if listing.commit else listing.source
        self.notes = tuple(notes)
        self._files = {file.name: file for file in listing.files}
        self._locate = locate
        self._stores = stores

    def names(self) -> list[str]:
        return sorted(name for name in self._files if "/" not in name)

    def below(self, pattern: str) -> list[str]:
        return sorted(n for n in self._files if n.count("/") == 1 and fnmatchcase(n.partition("/")[0], pattern))

    def has(self, name: str) -> bool:
        return name in self._files

    def identity(self, name: str) -> SourceFile:
        if check_relative(name, self.shown) not in self._files:
            raise SourceMissing(f"{self.shown}: has no file {escape(name)!r}")
        return self._locate(self._files[name])

    def get(self, name: str) -> bytes:
        return self._stores.read(self.identity(name))


def on_server(file: RemoteFile) -> SourceFile:
    """The file as plans record it; raises `UsageError` if the server does not say how large it is."""
    scheme, _, rest = file.url.partition("://")
    algorithm = next((name for name in _PREFERRED if name in file.digests), None)
    if file.nbytes is None:
        raise UsageError(
            f"{escape(file.name)}: the server does not say how large it is", hint="fetch it first: weightops download"
        )
    return SourceFile(
        path=f"{scheme.lower()}://{rest}",
        nbytes=file.nbytes,
        mtime_ns=0,
        digest=f"{algorithm}:{file.digests[algorithm]}" if algorithm else "",
        etag="" if algorithm else file.etag,
    )
