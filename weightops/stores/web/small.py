"""Small files, whole, in memory; and what a server says of a file without sending it."""

from __future__ import annotations

from collections.abc import Mapping

from weightops.errors import CorruptInput, Differs, SourceMissing
from weightops.io.escape import escape
from weightops.stores.hashing import FileHasher
from weightops.stores.web.body import Miscoded, RangeRefused
from weightops.stores.web.http import Http
from weightops.stores.web.listing import RemoteFile
from weightops.stores.web.urls import show

MAX_NBYTES = 200_000_000


def ask(url: str, web: Http, max_nbytes: int = MAX_NBYTES) -> tuple[bytes, Mapping[str, str]]:
    """One attempt at a small answer: its bytes and headers. Raises as `Http.get`, `CorruptInput` if it is too large."""
    try:
        return _ask(url, web, max_nbytes, raw=False)
    except Miscoded:
        return _ask(url, web, max_nbytes, raw=True)


def _ask(url: str, web: Http, max_nbytes: int, *, raw: bool) -> tuple[bytes, Mapping[str, str]]:
    data = bytearray()
    with web.get(url, raw=raw) as body:
        while block := body.read(1 << 20):
            data += block
            if len(data) > max_nbytes:
                raise CorruptInput(f"{show(url)}: more than {max_nbytes} bytes for a file of its kind")
        return bytes(data), body.headers


def read_whole(url: str, web: Http, digests: Mapping[str, str] | None = None, max_nbytes: int = MAX_NBYTES) -> bytes:
    """A small file's bytes. Raises as `ask`, `NetworkFailed`, `Differs` if a digest is wrong."""
    data, _ = web.retried(show(url), lambda: ask(url, web, max_nbytes))
    hasher = FileHasher(digests or (), len(data))
    hasher.update(memoryview(data))
    for name, found in hasher.digests().items():
        if digests and digests[name] != found:
            raise Differs(f"{show(url)}: {name} is {found}, expected {digests[name]}")
    return data


def describe(
    name: str, url: str, web: Http, digests: Mapping[str, str] | None = None, *, pages: bool = True
) -> RemoteFile:
    """A file's size and ETag, from an answer to a request for its first byte: servers sign HEAD less often than GET.

    Without `pages`, one for people is no file, and `SourceMissing` is raised as for any other that is not there.
    """

    def ask() -> RemoteFile:
        try:
            with web.get(url, 0, 1) as body:
                body.read(1)
                if not pages and body.content_type == "text/html":
                    raise SourceMissing(f"{show(url)}: the answer is a page for people")
                return RemoteFile(name, url, body.total, dict(digests or {}), body.etag)
        except RangeRefused as error:
            if error.total == 0:
                return RemoteFile(name, url, 0, dict(digests or {}))
            if error.total is not None:
                raise
        # It has no first byte, and the server does not say that it has none, as Ceph does not.
        with web.get(url) as body:
            return RemoteFile(name, url, body.total, dict(digests or {}), body.etag)

    return web.retried(f"{show(url)} ({escape(name)})", ask)
