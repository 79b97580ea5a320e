"""Calls of a hub's API: one request with a small answer, and its JSON as a value."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from weightops.errors import CorruptInput, NetworkFailed
from weightops.stores.web.body import Body
from weightops.stores.web.http import Buffer, Http
from weightops.stores.web.policy import Transient
from weightops.stores.web.urls import show
from weightops.version import __version__

_MAX_ANSWER_NBYTES = 16 << 20
_JSON = "application/json"
Shape = TypeVar("Shape")


@dataclass(frozen=True, slots=True)
class Answer:
    """A small answer, whole."""

    status: int
    headers: Mapping[str, str]
    data: bytes


def call(
    web: Http,
    method: str,
    url: str,
    body: Buffer | Iterator[Buffer] = b"",
    *,
    nbytes: int | None = None,
    headers: Mapping[str, str] = {},
    allowed: Collection[int] = (),
) -> Answer:
    """One attempt at a request. `nbytes` is the length of a body that comes piece by piece.

    Redirects are not followed: what is sent is meant for whom it is sent to. Raises `Transient`, `SourceMissing`,
    `AuthenticationFailed`, `NoRoom` and `NetworkFailed` for a status that is neither success nor `allowed`.
    """
    length = len(body) if isinstance(body, bytes | memoryview) else nbytes
    own = {"Accept-Encoding": "identity", "User-Agent": f"weightops/{__version__}", "Content-Length": str(length)}
    with Body(web, url, web.request(method, url, {**own, **headers}, body or None)) as answer:
        if not 200 <= answer.status < 300 and answer.status not in allowed:
            answer.refuse()
        answer.expect()
        data = bytearray()
        while block := answer.read(1 << 20):
            data += block
            if len(data) > _MAX_ANSWER_NBYTES:
                raise CorruptInput(f"{show(url)}: an answer of more than {_MAX_ANSWER_NBYTES} bytes")
        return Answer(answer.status, answer.headers, bytes(data))


def post(web: Http, url: str, document: Any, *, content_type: str = _JSON, allowed: Collection[int] = ()) -> Answer:
    """One attempt at a call whose body is JSON; raises as `call` does."""
    headers = {"Content-Type": content_type, "Accept": content_type}
    return call(web, "POST", url, json.dumps(document).encode(), headers=headers, allowed=allowed)


def decode(data: bytes, url: str, shape: type[Shape]) -> Shape:
    """An answer's JSON as a value. Raises `Transient` for what makes no sense, `NetworkFailed` for a page."""
    try:
        return msgspec.json.decode(data, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        if data.lstrip().startswith(b"<"):
            raise NetworkFailed(
                f"{show(url)}: the answer is a page for people, not a hub's",
                hint="is HF_ENDPOINT a hub? a proxy's or network's login page may stand in between",
            ) from None
        raise Transient(f"{show(url)}: an answer without sense") from None
