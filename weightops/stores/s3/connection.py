"""Object stores as one command reaches them: the connections of `Web`, with requests that are signed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from weightops.errors import CorruptInput
from weightops.io.escape import escape
from weightops.stores.s3.account import Account, open_account
from weightops.stores.s3.places import located
from weightops.stores.s3.refusals import code_of, parse_answer, refusal
from weightops.stores.web.body import RangeRefused, in_words
from weightops.stores.web.http import Buffer, finish
from weightops.stores.web.policy import Policy, Transient, wished_wait_s
from weightops.stores.web.urls import show
from weightops.stores.web.web import Web
from weightops.version import __version__

_EMPTY = hashlib.sha256().hexdigest()
_MAX_ANSWER_NBYTES = 16 << 20
_MAX_REFUSAL_NBYTES = 64 << 10


@dataclass(frozen=True)
class Answer:
    """A small answer, whole."""

    headers: Mapping[str, str]
    data: bytes


class S3(Web):
    """Connections to object stores; reads objects by their address, `s3://bucket/key` (a `Remote`).

    Raises as `Web` does, `AuthenticationFailed` also for a clock that is wrong and a token that has expired,
    `SourceMissing` for a bucket or object that is not there, `NoRoom`.
    """

    def __init__(
        self,
        account: Account | None = None,
        policy: Policy | None = None,
        *,
        proxy_for: Callable[[str], str | None] = lambda url: None,
    ) -> None:
        self.account = account or open_account()
        super().__init__(policy, proxy_for=proxy_for, ahead=self.account.ranges)

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: Buffer | Iterator[Buffer] | None = None
    ) -> urllib3.BaseHTTPResponse:
        """As `Http.request`, signed; what the store refuses raises what that means, also a redirect.

        A body has to be there whole, because the signature is one of its digest.
        """
        assert body is None or isinstance(body, bytes | memoryview)
        return self._send(method, url, {}, headers, body, None)

    def call(
        self,
        method: str,
        url: str,
        query: Mapping[str, str] = {},
        headers: Mapping[str, str] = {},
        body: Buffer = b"",
        sha256: str | None = None,
    ) -> Answer:
        """One attempt at a request with a small answer. `sha256` is the body's digest, if it is known already."""
        headers = {"User-Agent": f"weightops/{__version__}", "Accept-Encoding": "identity", **headers}
        if method in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        response = self._send(method, url, query, headers, body or None, sha256)
        try:
            data = response.read(_MAX_ANSWER_NBYTES)
        except (HTTPError, OSError, ValueError, AttributeError) as error:
            self.check()
            response.close()
            raise Transient(f"the answer broke off: {in_words(error)}") from None
        if len(data) == _MAX_ANSWER_NBYTES:
            response.close()
            raise CorruptInput(f"{show(url)}: the store's answer has more than {_MAX_ANSWER_NBYTES} bytes")
        finish(response)
        return Answer(response.headers, data)

    def _send(
        self,
        method: str,
        url: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: Buffer | None,
        sha256: str | None,
    ) -> urllib3.BaseHTTPResponse:
        bucket, key = located(url)
        digest = sha256 or (hashlib.sha256(body).hexdigest() if body else _EMPTY)
        while True:
            where, signed = self.account.signed(method, bucket, key, query, headers, digest)
            response = super().request(method, where, signed, body)
            if response.status < 300:
                if "Content-Range" in response.headers:
                    response.status = 206  # which rclone gives as 200
                return response
            region = response.headers.get("x-amz-bucket-region", "")
            if response.status in (301, 307, 400) and region and self.account.move(bucket, region):
                finish(response)
                continue
            self._refuse(show(url), where, response)

    def _refuse(self, shown: str, where: str, response: urllib3.BaseHTTPResponse) -> None:
        """Raise what an answer means that is none."""
        try:
            data = response.read(_MAX_REFUSAL_NBYTES)
        except (HTTPError, OSError, ValueError, AttributeError):
            self.check()
            data = b""
        finish(response)
        if response.status == 416:
            raise RangeRefused(f"{shown}: status 416", _size_of(data, response.headers))
        server = escape(urlsplit(where).netloc)
        raise refusal(shown, server, response.status, code_of(data), wished_wait_s(response.headers))


def _size_of(data: bytes, headers: Mapping[str, str]) -> int | None:
    """How large an object is of which a range was asked for that it has not."""
    said = headers.get("Content-Range", "").rpartition("/")[2]
    if not said.isdecimal():
        try:
            said = parse_answer(data, "").findtext("ActualObjectSize") or ""
        except CorruptInput:
            return None
    return int(said) if said.isdecimal() and len(said) < 19 else None
