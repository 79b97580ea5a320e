"""HTTP for bytes: ranges, redirects by our own rules, retries, a watch over slow connections, a limit on the rate.

urllib3 speaks HTTP; what is here decides whom to talk to, what to believe, and when to give up. RFC 9110 is the
source for ranges, validators and Retry-After.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urljoin

import urllib3
from urllib3.exceptions import HTTPError

from weightops.errors import (
    AuthenticationFailed,
    CorruptInput,
    NetworkFailed,
    WeightopsError,
)
from weightops.io.escape import escape
from weightops.stores.web.body import Body, in_words
from weightops.stores.web.policy import Policy, Transient
from weightops.stores.web.proxy import check_proxy, refused, through
from weightops.stores.web.urls import DEFAULT_ENDPOINT, check_redirect, host_of, origin, show
from weightops.version import __version__

_MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_TICK_S = 0.2
_MAX_IDLE = 16
_TOLD_WAIT_S = 5.0
_MAX_DRAINED_NBYTES = 64 << 10
_PIECE_NBYTES = 256 << 10

Buffer = bytes | memoryview
Result = TypeVar("Result")


class Http:
    """Connections to servers, shared by the threads of one command; a context manager.

    `endpoint` is the hub that is meant by `org/name`, and the one origin that may see `token`. `proxy_for` gives the
    proxy for a URL, if it has one. After `interrupt`, everything that waits ends at once.
    Raises `AuthenticationFailed` for a token that can be none.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        endpoint: str = DEFAULT_ENDPOINT,
        token: str | None = None,
        proxy_for: Callable[[str], str | None] = lambda url: None,
    ) -> None:
        if token and (odd := next((c for c in token if not "!" <= c <= "~"), None)):
            raise AuthenticationFailed(
                f"the token holds a character that no token has ({odd!a})", hint="copy it into HF_TOKEN again"
            )
        self.policy = policy or Policy()
        self.endpoint = endpoint.rstrip("/")
        self.token = token
        self._token_origin = origin(endpoint)
        self._proxy_for = proxy_for
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._bodies: set[Body] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped: WeightopsError | None = None
        self._closed = False
        self._watcher: threading.Thread | None = None
        self._started_s = time.monotonic()
        self._next_byte_s = 0.0
        self.received_nbytes = 0
        self.on_wait: Callable[[str], object] = lambda text: None
        """Told, from any thread, why nothing will happen for seconds."""

    def get(self, url: str, start: int = 0, stop: int | None = None, validator: str = "", *, raw: bool = False) -> Body:
        """Ask once for the bytes `[start, stop)`, or all of them; the answer may begin at 0 all the same.

        `validator` is the strong ETag that the bytes must belong to: if the file has another one by now, the
        answer begins at 0; so it does if the server sends a coded file, of which no part makes sense, and not `raw`.
        Redirects are followed as long as they go to no lesser scheme and, from a public host,
        to no private one; the token stays with its origin.
        Raises `Transient`, `SourceMissing`, `AuthenticationFailed`, `RangeRefused`, `CorruptInput` for an answer
        that contradicts itself or a redirect that is not followed, and what `interrupt` was given.
        """
        headers = {"Accept-Encoding": "identity", "User-Agent": f"weightops/{__version__}"}
        ranged = start > 0 or stop is not None
        if ranged:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
            if validator:
                headers["If-Range"] = f'"{validator}"'
        location = url
        for _ in range(_MAX_REDIRECTS):
            response = self.request("GET", location, headers)
            if response.status not in _REDIRECTS:
                body = Body(self, url, response, raw=raw)
                self._watch(body)
                if body.is_decoded and body.status == 206:
                    body.close()
                    start, stop, ranged = 0, None, False
                    headers = {name: value for name, value in headers.items() if name not in ("Range", "If-Range")}
                    continue
                try:
                    body.check(start, stop, ranged)
                except BaseException:
                    body.close()
                    raise
                return body
            finish(response)
            try:
                target = urljoin(location, response.headers.get("Location", ""))
            except ValueError:
                raise CorruptInput(f"{show(location)} redirects to what is no URL") from None
            check_redirect(location, target)
            location = target
        raise CorruptInput(f"{show(url)}: more than {_MAX_REDIRECTS} redirects")

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: Buffer | Iterator[Buffer] | None = None
    ) -> urllib3.BaseHTTPResponse:
        """One request, by the proxy that is for it and with the token if that is for it; the answer as it comes.

        Of a body that comes piece by piece the headers have to say the length.
        Raises `Transient`, `NetworkFailed`, `AuthenticationFailed`, and what `interrupt` was given.
        """
        self.check()
        self._start_watching()
        proxy = self._proxy_for(url)
        headers = dict(headers)
        if origin(url) == self._token_origin and self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            response = self._pool(proxy).request(
                method,
                url,
                body=self._pieces(body) if body is not None else None,  # type: ignore[arg-type]  # sent as they are
                headers=headers,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=self.policy.connect_timeout_s, read=self.policy.timeout_s),
            )
        except (HTTPError, OSError) as error:
            self.check()
            if proxy is not None:
                check_proxy(proxy, error, worked=self.received_nbytes > 0)
            message = f"{escape(host_of(url))}: {in_words(error)}"
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise NetworkFailed(
                    message, hint="is it the right host? SSL_CERT_FILE names other authorities"
                ) from None
            raise Transient(message) from None
        if response.status == 407:
            response.close()
            raise refused(proxy or host_of(url), 407, response.reason or "")
        return response

    def _pieces(self, body: Buffer | Iterator[Buffer]) -> Iterator[memoryview]:
        """A body in pieces: each has the time-out to itself, and between them all can stop."""
        for block in iter([body]) if isinstance(body, bytes | memoryview) else body:
            view = memoryview(block)
            for start in range(0, len(view), _PIECE_NBYTES):
                self.check()
                yield view[start : start + _PIECE_NBYTES]

    def _pool(self, proxy: str | None) -> urllib3.PoolManager:
        with self._lock:
            if proxy not in self._pools:
                pool = through(proxy, _MAX_IDLE) if proxy else urllib3.PoolManager(maxsize=_MAX_IDLE)
                pool.pool_classes_by_scheme = {
                    scheme: _watched_pool(kind, self._sockets) for scheme, kind in pool.pool_classes_by_scheme.items()
                }
                self._pools[proxy] = pool
            return self._pools[proxy]

    def retried(self, what: str, call: Callable[[], Result]) -> Result:
        """The result of `call`, tried again as long as what it raises is `Transient`; see `Tries`."""
        tries = Tries(self, what)
        while True:
            try:
                return call()
            except Transient as error:
                tries.failed(error)

    def sleep(self, seconds: float) -> None:
        """Wait; raises what `interrupt` was given as soon as it is."""
        self._wake.wait(seconds)
        self.check()

    def throttle(self, nbytes: int) -> None:
        """Count `nbytes` that arrived, and wait until they may have done so under `limit_rate`."""
        self.received_nbytes += nbytes
        if self.policy.limit_rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._next_byte_s = max(self._next_byte_s, now) + nbytes / self.policy.limit_rate
            wait_s = self._next_byte_s - now
        self.sleep(wait_s)

    def check(self) -> None:
        """Raise what `interrupt` was given, if it was."""
        self._keep_deadline()
        if self._stopped is not None:
            raise self._stopped

    def _keep_deadline(self) -> None:
        if self.left_s <= 0:
            message = f"not done within the deadline of {self.policy.deadline_s:g} s"
            self.interrupt(NetworkFailed(message, hint="run the same command again: it continues"))

    @property
    def left_s(self) -> float:
        """Seconds up to the deadline."""
        if self.policy.deadline_s is None:
            return float("inf")
        return self._started_s + self.policy.deadline_s - time.monotonic()

    def interrupt(self, error: WeightopsError) -> None:
        """Make all that waits or reads, now or later, raise `error`; safe in a signal handler."""
        self._stopped = self._stopped or error
        self._wake.set()

    def resume(self) -> None:
        """Read again after `interrupt`, when nobody waits or reads any more."""
        self._stopped = None
        self._wake.clear()

    def _start_watching(self) -> None:
        with self._lock:
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._keep_watch, name="watch", daemon=True)
                self._watcher.start()

    def _watch(self, body: Body) -> None:
        """Keep an eye on a body until it is closed."""
        with self._lock:
            self._bodies.add(body)

    def unwatch(self, body: Body) -> None:
        """The body is closed."""
        with self._lock:
            self._bodies.discard(body)

    def _keep_watch(self) -> None:
        while not self._closed:
            time.sleep(_TICK_S)
            self._keep_deadline()
            if self._stopped is not None:
                for connected in list(self._sockets):
                    _shut(connected)
            with self._lock:
                bodies = list(self._bodies)
            for body in bodies:
                body.check_rate()

    def close(self) -> None:
        self._closed = True
        for pool in self._pools.values():
            pool.clear()
        for connected in list(self._sockets):
            _shut(connected)  # or who waits for it would not notice
            connected.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Tries:
    """Counts failures in a row, and waits between attempts."""

    def __init__(self, web: Http, what: str) -> None:
        self._web, self._what, self._failures = web, what, 0

    def progressed(self) -> None:
        """The last attempt brought something."""
        self._failures = 0

    def failed(self, error: Transient) -> None:
        """Wait before the next attempt; raises `NetworkFailed` when there should be none."""
        self._failures += 1
        policy = self._web.policy
        delay_s = max(policy.delay_s(self._failures), error.retry_after_s)
        if error.retry_after_s > policy.max_retry_after_s:
            asked, allowed = error.retry_after_s, policy.max_retry_after_s
            why = f"; the server asks to wait {asked:.0f} s, at most {allowed:.0f} are waited"
        elif self._failures >= policy.attempts:
            why = f"; gave up after {self._failures} attempts"
        elif delay_s > self._web.left_s:
            why = f"; the deadline of {policy.deadline_s:g} s is too near to try again"
        else:
            if delay_s >= _TOLD_WAIT_S:
                self._web.on_wait(f"{self._what}: {error}; trying again in {delay_s:.0f} s")
            self._web.sleep(delay_s)
            return
        raise NetworkFailed(f"{self._what}: {error}{why}", hint="run the same command again later: it continues")


def finish(response: urllib3.BaseHTTPResponse) -> None:
    """Keep the connection if what is left to read of the answer is little."""
    length = response.headers.get("Content-Length", "")
    if length.isascii() and length.isdigit() and int(length) <= _MAX_DRAINED_NBYTES:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()


def _shut(connected: socket.socket) -> None:
    try:
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed meanwhile


def _watched_pool(kind: Any, sockets: weakref.WeakSet[socket.socket]) -> Any:
    """A urllib3 pool class whose connections put their sockets into `sockets`, so that they can be shut."""

    class Connection(kind.ConnectionCls):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            sockets.add(self.sock)

    return type(kind.__name__, (kind,), {"ConnectionCls": Connection})
