"""Who may ask, and what a browser may do with the answer: the outermost layer, in plain ASGI.

Other pages that a browser has open must not reach models on this machine. A name of theirs that is made to lead here
(DNS rebinding) comes with its own `Host`; a script of theirs with its `Origin`; a form of theirs without
`application/json`. All three are refused, and no header lets other origins read an answer. What is allowed beyond that
was said on the command line. See OWASP's notes on cross-site request forgery, and CVE-2025-66414 for the first kind.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from weightops.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_NBYTES = 1 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
"""What goes with every answer."""
_OPEN = ("/health", "/", "/page.css", "/page.js", "/page-icon.svg")
"""Paths that say nothing of models, which need no key."""


@dataclass(frozen=True)
class Rules:
    """Hosts by which the server may be called, besides loopback; origins that may read; the key, if there is one."""

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    api_key: str | None = None

    @classmethod
    def of(cls, hosts: Iterable[str] = (), origins: Iterable[str] = (), api_key: str | None = None) -> Rules:
        """The same from what somebody typed."""
        return cls(frozenset(map(str.lower, hosts)), frozenset(o.lower().rstrip("/") for o in origins), api_key)


class Guard:
    """An ASGI application that lets through to `app` what the rules allow, and answers the rest itself."""

    def __init__(self, app: App, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        origin = _one(headers, "origin")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                allowed = self._cross_origin(origin)
                message["headers"] = [*message.get("headers", []), *HEADERS, *allowed]
            await send(message)

        try:
            if scope["method"] == "OPTIONS" and self._cross_origin(origin):
                self._check_host(headers)
                await _respond(answer, 204, b"", [])
                return
            self._check(scope, headers, origin)
        except ApiError as error:
            await _refuse(answer, error)
            return
        await self._app(scope, _limited(receive), answer)

    def _check(self, scope: Scope, headers: dict[str, list[str]], origin: str | None) -> None:
        self._check_host(headers)
        host = (_one(headers, "host") or "").lower()
        if origin is not None and origin.lower() not in self._rules.origins:
            parts = urlsplit(origin)
            if origin == "null" or parts.scheme not in ("http", "https") or parts.netloc.lower() != host:
                raise ApiError(403, f"pages of {origin[:200]!a} may not ask here", code="origin_not_allowed")
        if _one(headers, "sec-fetch-site") == "cross-site" and origin is None and scope["path"] != "/":
            raise ApiError(403, "pages of other sites may not ask here", code="origin_not_allowed")
        if scope["method"] == "POST":
            kind = (_one(headers, "content-type") or "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
        self._check_key(scope, headers)
        _check_length(headers)

    def _check_host(self, headers: dict[str, list[str]]) -> None:
        hosts = headers.get("host", [])
        name = _hostname(hosts[0]) if len(hosts) == 1 else None
        if name is None or name not in {*LOOPBACK, *self._rules.hosts}:
            shown = f"{hosts[0][:200]!a}" if hosts else "no name"
            raise ApiError(400, f"this server is not called {shown}; see --allow-host", code="host_not_allowed")

    def _check_key(self, scope: Scope, headers: dict[str, list[str]]) -> None:
        key = self._rules.api_key
        if key is None or scope["path"] in _OPEN:
            return
        scheme, _, given = (_one(headers, "authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError(401, "give the server's key as a bearer token", code="invalid_api_key")

    def _cross_origin(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        """Headers that let an origin read the answer, if it may."""
        if origin is None or origin.lower() not in self._rules.origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"vary", b"origin"),
        ]


def _limited(receive: Receive) -> Receive:
    """Receives the body of a request, of which no more is read than there may be."""
    nbytes = 0

    async def limited() -> Message:
        nonlocal nbytes
        message = await receive()
        nbytes += len(message.get("body", b""))
        if nbytes > MAX_BODY_NBYTES:
            raise too_large()
        return message

    return limited


def too_large() -> ApiError:
    """The body is too large."""
    return ApiError(413, f"a request may have {MAX_BODY_NBYTES} bytes", code="request_too_large")


def _check_length(headers: dict[str, list[str]]) -> None:
    length = _one(headers, "content-length")
    if length is not None and (not length.isdecimal() or int(length[:20]) > MAX_BODY_NBYTES):
        raise too_large()


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _one(headers: dict[str, list[str]], name: str) -> str | None:
    values = headers.get(name, [])
    return values[0] if len(values) == 1 else ("" if values else None)


def _hostname(host: str) -> str | None:
    """The name in a `Host` header, without its port; None for what is no such header."""
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        ok = bracket and (not port or (port[0] == ":" and port[1:].isdecimal()))
    else:
        name, colon, port = host.partition(":")
        ok = not colon or port.isdecimal()
    return name.lower() if ok and name else None


async def _refuse(send: Send, error: ApiError) -> None:
    more = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    body = json.dumps(error.document(), ensure_ascii=False).encode()
    await _respond(send, error.status, body, [(b"content-type", b"application/json"), *more])


async def _respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})
