"""Contents of large files on their way to a hub: git LFS, and the hub's own way of sending them in parts.

Sources: https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md, and `lfs.py` of huggingface_hub for parts
(`chunk_size` and numbered URLs in the header of the upload). What a hub has already, by its SHA-256, is not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from weightops.errors import CorruptInput, NetworkFailed, NoRoom
from weightops.io.escape import escape
from weightops.stores.outgoing import Outgoing
from weightops.stores.web.body import FULL
from weightops.stores.web.calls import Answer, call, decode, post
from weightops.stores.web.http import Http
from weightops.stores.web.listing import HubRepository
from weightops.stores.web.urls import DEFAULT_ENDPOINT, check_redirect

_CONTENT_TYPE = "application/vnd.git-lfs+json"
_MAX_PARTS = 100_000


class _Action(msgspec.Struct):
    href: str
    header: dict[str, Any] | None = None


class _Actions(msgspec.Struct):
    upload: _Action | None = None
    verify: _Action | None = None


class _Error(msgspec.Struct):
    code: int
    message: str = ""


class _Object(msgspec.Struct):
    oid: str
    actions: _Actions | None = None
    error: _Error | None = None


class _Batch(msgspec.Struct):
    objects: list[_Object]


def send_content(
    file: Outgoing, repository: HubRepository, web: Http, on_bytes: Callable[[int], object] = lambda nbytes: None
) -> bool:
    """Bring a file's content to the hub; False if it was there. `on_bytes` is told of bytes sent, and taken back.

    Raises `NetworkFailed`, `AuthenticationFailed`, `NoRoom`, `CorruptInput` for answers without sense and for a file
    that has changed.
    """
    shown = f"{repository}/{escape(file.name)}"
    actions = web.retried(shown, lambda: _ask(file, repository, web, shown))
    if actions is None or actions.upload is None:
        return False
    header = {name: str(value) for name, value in (actions.upload.header or {}).items()}
    url = _address(actions.upload.href, repository, web)
    part_nbytes = header.pop("chunk_size", None)
    if part_nbytes is None:
        _send(file, 0, file.nbytes, url, header, shown, web, on_bytes)
    else:
        parts = _parts(header, part_nbytes, file.nbytes, shown)
        etags = []
        for number, (start, stop, href) in enumerate(parts, 1):
            answer = _send(file, start, stop, _address(href, repository, web), {}, shown, web, on_bytes)
            if not answer.headers.get("ETag"):
                raise NetworkFailed(f"{shown}: the hub's storage gives no ETag for part {number}")
            etags.append({"partNumber": number, "etag": answer.headers["ETag"]})
        whole = {"oid": file.sha256, "parts": etags}
        web.retried(shown, lambda: post(web, url, whole, content_type=_CONTENT_TYPE))
    if actions.verify is not None:
        proof = {"oid": file.sha256, "size": file.nbytes}
        there = _address(actions.verify.href, repository, web)
        web.retried(shown, lambda: post(web, there, proof, content_type=_CONTENT_TYPE))
    return True


def _ask(file: Outgoing, repository: HubRepository, web: Http, shown: str) -> _Actions | None:
    """What is to be done with a content, None if nothing."""
    endpoint = repository.endpoint or web.endpoint
    url = f"{endpoint}/{repository.name}.git/info/lfs/objects/batch"
    document = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": [{"oid": file.sha256, "size": file.nbytes}],
        "hash_algo": "sha256",
        "ref": {"name": repository.revision},
    }
    answer = decode(post(web, url, document, content_type=_CONTENT_TYPE).data, url, _Batch)
    found = next((each for each in answer.objects if each.oid == file.sha256), None)
    if found is None:
        raise CorruptInput(f"{shown}: the hub answers for another content")
    if found.error is not None:
        refused = NoRoom if found.error.code in FULL else NetworkFailed
        raise refused(f"{shown}: the hub does not take it (status {found.error.code}, {escape(found.error.message)})")
    return found.actions


def _address(href: str, repository: HubRepository, web: Http) -> str:
    """Where to send something: a mirror that passes on the hub's own address means itself.

    Raises `CorruptInput` for an address that a redirect would not be followed to.
    """
    endpoint = repository.endpoint or web.endpoint
    if href.startswith(f"{DEFAULT_ENDPOINT}/"):
        href = endpoint + href.removeprefix(DEFAULT_ENDPOINT)
    check_redirect(endpoint, href)
    return href


def _parts(header: Mapping[str, str], part_nbytes: str, nbytes: int, shown: str) -> list[tuple[int, int, str]]:
    """Start, stop and address of each part."""
    size = int(part_nbytes) if part_nbytes.isdecimal() and len(part_nbytes) < 16 else 0
    numbered = {int(n): href for n, href in header.items() if n.isascii() and n.isdecimal() and len(n) < 9}
    count = -(-nbytes // size) if size else 0
    if not 0 < count <= _MAX_PARTS or sorted(numbered) != list(range(1, count + 1)):
        raise CorruptInput(
            f"{shown}: the hub wants {escape(part_nbytes)} bytes a part, and gives {len(numbered)} addresses for "
            f"{nbytes} bytes"
        )
    return [(i * size, min(nbytes, (i + 1) * size), numbered[i + 1]) for i in range(count)]


def _send(
    file: Outgoing,
    start: int,
    stop: int,
    url: str,
    headers: Mapping[str, str],
    shown: str,
    web: Http,
    on_bytes: Callable[[int], object],
) -> Answer:
    """Send a range of a file, as often as it takes."""

    def attempt() -> Answer:
        sent = 0

        def pieces() -> Iterator[memoryview]:
            nonlocal sent
            for block in file.blocks(start, stop):
                yield block
                sent += len(block)
                on_bytes(len(block))

        try:
            return call(web, "PUT", url, pieces(), nbytes=stop - start, headers=headers)
        except BaseException:
            on_bytes(-sent)
            raise

    return web.retried(shown, attempt)
