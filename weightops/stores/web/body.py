"""An answer as it arrives: held against what was asked for, and watched for silence."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import NoReturn, Protocol, Self

import urllib3
from urllib3.exceptions import DecodeError, HTTPError
from urllib3.response import HTTPResponse

from weightops.errors import AuthenticationFailed, NetworkFailed, NoRoom, SourceMissing, WeightopsError
from weightops.io.escape import escape
from weightops.stores.web.policy import Policy, Transient, wished_wait_s
from weightops.stores.web.urls import show

FULL = (402, 413, 507)
"""What servers say that take no more, or no more without money."""
RETRIED = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_READ_NBYTES = 256 << 10
_CODINGS = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress")
"""Content codings (RFC 9110, section 8.4.1); what else servers write there changes nothing about the bytes."""
_MAX_EXPLANATION_NBYTES = 4096


_CODES = {
    "RepoNotFound": "no such repository, or a private one",
    "RevisionNotFound": "no such revision",
    "EntryNotFound": "no such file",
    "GatedRepo": "access to the repository is gated",
}
"""What a hub's X-Error-Code means."""


class Watcher(Protocol):
    """What a body needs of the `Web` that it came through."""

    policy: Policy

    def check(self) -> None:
        """Raise if all should stop."""

    def throttle(self, nbytes: int) -> None:
        """Wait until so many more bytes may have arrived."""

    def unwatch(self, body: Body) -> None:
        """The body is closed."""


class RangeRefused(WeightopsError):
    """Status 416: the file has no such bytes; `total` is how many it has, if the server says so."""

    def __init__(self, message: str, total: int | None) -> None:
        super().__init__(message)
        self.total = total


class Miscoded(Transient):
    """The bytes are not in the coding that the answer names."""


class Body:
    """The bytes of an answer as they arrive: those from `start` of a file of `total` bytes (None: not said).

    `coding` is the content coding of what is sent, if any. It `is_decoded` where that can be done, unless `raw`: then
    `total` is not known, and `sent_nbytes` is the size of what is sent.
    """

    def __init__(self, web: Watcher, url: str, response: urllib3.BaseHTTPResponse, *, raw: bool = False) -> None:
        self._web, self._response = web, response
        self.shown = show(url)
        named = [token.strip().lower() for token in response.headers.get("Content-Encoding", "").split(",")]
        self.coding = ", ".join(named) if named and all(token in _CODINGS for token in named) else ""
        self.is_decoded = bool(self.coding) and not raw and set(named) <= set(HTTPResponse.CONTENT_DECODERS)
        self.content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        self.sent_nbytes = _number(response.headers.get("Content-Length", ""))
        self.etag = _strong(response.headers.get("ETag", ""))
        self.headers: Mapping[str, str] = response.headers
        self.start = 0
        self.status = response.status
        self.is_part = response.status == 206
        self.total: int | None = None
        self._received = 0
        self._expected: int | None = None
        self._framed = False
        self._waited_s = 0.0
        self._waiting_since_s: float | None = None
        self._mark = (0, 0.0)
        self._aborted = ""

    def check(self, start: int, stop: int | None, ranged: bool) -> None:
        """Hold status and headers against what was asked for, and learn where the bytes belong."""
        headers, status = self._response.headers, self._response.status
        if status not in (200, 206):
            self.refuse()
        self.expect()
        if status == 200:
            self.total = self._expected
            return
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if match is None or not ranged:
            raise Transient(f"{self.shown}: a partial answer that does not say which part it is")
        self.start, last = int(match[1]), int(match[2])
        self.total = None if match[3] == "*" else int(match[3])
        wanted = last + 1 if stop is None else stop
        end = min(wanted, self.total) if self.total is not None else wanted
        if (self.start, last + 1) != (start, end) or self._expected not in (None, end - start):
            raise Transient(f"{self.shown}: asked for bytes {start} to {end - 1}, was offered {escape(match[0])}")
        self._expected = end - start

    def expect(self) -> None:
        """Learn from the headers how many bytes are to come."""
        self._expected = None if self.is_decoded else self.sent_nbytes
        self._framed = self._expected is not None and "Transfer-Encoding" not in self.headers

    def refuse(self) -> NoReturn:
        """Raise what the status of an answer means that is none."""
        headers, status = self._response.headers, self.status
        code = headers.get("X-Error-Code", "")
        words = [_CODES.get(code, ""), headers.get("X-Error-Message", "") or self._explanation()]
        said = "; ".join(escape(part) for part in words if part) or escape(self._response.reason or "")
        message = f"{self.shown}: status {status}" + (f" ({said})" if said else "")
        if status in RETRIED:
            raise Transient(message, wished_wait_s(headers))
        if status in (401, 403):
            raise AuthenticationFailed(message, hint=_hint(code, status))
        if status == 416:
            raise RangeRefused(message, _number(headers.get("Content-Range", "").rpartition("/")[2]))
        if status in (404, 410):
            raise SourceMissing(message)
        if status in FULL:
            raise NoRoom(message)
        raise NetworkFailed(message)

    def _explanation(self) -> str:
        """The sentence that a hub writes into the body of a refusal, as JSON."""
        if self.content_type != "application/json" or (self.sent_nbytes or 0) > _MAX_EXPLANATION_NBYTES:
            return ""
        try:
            found = json.loads(self._response.read(_MAX_EXPLANATION_NBYTES))
        except (HTTPError, OSError, ValueError, RecursionError):
            return ""
        said = found.get("error") if isinstance(found, dict) else None
        return said if isinstance(said, str) else ""

    def read(self, nbytes: int) -> bytes:
        """The next bytes, at most `nbytes`; none at the end.

        Raises `Transient` if the connection breaks, `Miscoded` if they are not in the coding that they should be in.
        """
        self._waiting_since_s = started = time.monotonic()
        try:
            data = self._response.read(min(nbytes, _READ_NBYTES), decode_content=self.is_decoded)
        except DecodeError:
            self._web.check()
            raise Miscoded(f"{self.shown}: the bytes are not what Content-Encoding says ({self.coding})") from None
        except (HTTPError, OSError, ValueError, AttributeError) as error:
            raise self._broken(in_words(error)) from None
        finally:
            self._waiting_since_s = None
            self._waited_s += time.monotonic() - started
        self._received += len(data)
        if not data and self._aborted:
            raise self._broken("")
        if not data and self._expected not in (None, self._received):
            raise self._broken(f"ended after {self._received} bytes, expected {self._expected}")
        if self._expected is not None and self._received > self._expected:
            raise self._broken(f"sent {self._received} bytes, expected {self._expected}")
        self._web.throttle(len(data))
        return data

    def _broken(self, why: str) -> Transient:
        self._web.check()
        return Transient(f"{self.shown}: {self._aborted or why}")

    @property
    def ends_by_itself(self) -> bool:
        """Whether a body that was cut short can be told from a whole one."""
        return self.sent_nbytes is not None or "chunked" in self._response.headers.get("Transfer-Encoding", "").lower()

    def check_rate(self) -> None:
        """Give the connection up if it brought too little over the last `timeout_s` of waiting."""
        policy = self._web.policy
        since = self._waiting_since_s
        waited_s = self._waited_s + (time.monotonic() - since if since is not None else 0.0)
        marked, marked_s = self._mark
        if waited_s - marked_s < policy.timeout_s:
            return
        nbytes = self._received - marked
        self._mark = (self._received, waited_s)
        if nbytes < policy.min_rate * policy.timeout_s:
            self._aborted = f"only {nbytes} bytes in {policy.timeout_s:g} s"
            try:
                self._response.shutdown()
            except (ValueError, RuntimeError, OSError):
                return  # it has ended by itself

    def close(self) -> None:
        self._web.unwatch(self)
        if self._framed and self._received == self._expected and not self._aborted:
            self._response.release_conn()  # nothing is left to read, so the next request may follow
        else:
            self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _hint(code: str, status: int) -> str:
    """What to do about a refusal."""
    if code != "GatedRepo":
        return "check HF_TOKEN"
    if status == 401:
        return "accept the terms on its page, and set HF_TOKEN"
    return "open its page with the account of HF_TOKEN: terms are to be accepted there, or an answer is to be awaited"


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _strong(etag: str) -> str:
    """The opaque part of a strong ETag; nothing for a weak one, which says nothing about bytes."""
    etag = etag.strip()
    return etag[1:-1] if len(etag) > 1 and etag[0] == etag[-1] == '"' else ""


def in_words(error: BaseException) -> str:
    """What went wrong in a connection, without the library's objects in it."""
    cause = getattr(error, "reason", None) or (error.__cause__ if error.__cause__ is not None else error)
    text = re.sub(r"<[^>]*>[:,]? ?|^\w+\([^)]*\): ", "", str(cause if isinstance(cause, BaseException) else error))
    return escape(text.strip("() '")[:200]) or type(error).__name__
