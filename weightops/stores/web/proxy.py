"""Proxies: who has to say what to get through one, and what it means when it does not let us."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote

import urllib3
from urllib3.exceptions import ProxyError

from weightops.errors import AuthenticationFailed, NetworkFailed, WeightopsError
from weightops.io.escape import escape
from weightops.stores.web.body import RETRIED, in_words
from weightops.stores.web.policy import Transient

_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3}) ?([^')\"]*)")


def through(proxy: str, max_idle: int) -> urllib3.ProxyManager:
    """Connections through a proxy, with the user name and password that its URL may have (RFC 7617)."""
    auth = urllib3.util.parse_url(proxy).auth
    headers = {}
    if auth:
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(unquote(auth).encode()).decode()}"
    return urllib3.ProxyManager(proxy, proxy_headers=headers, maxsize=max_idle)


def check_proxy(proxy: str, error: BaseException, *, worked: bool) -> None:
    """Raise if an error is the proxy's, and not the server's behind it; what never `worked` is not tried again."""
    if match := _TUNNEL.search(str(error)):
        raise refused(proxy, int(match[1]), match[2])
    if isinstance(error, ProxyError):
        message = f"the proxy {_shown(proxy)} cannot be reached: {in_words(error.original_error)}"
        if worked:
            raise Transient(message)
        raise NetworkFailed(
            message, hint="is it right in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY? NO_PROXY names hosts that need none"
        )


def refused(proxy: str, status: int, reason: str) -> WeightopsError:
    """The error for a proxy that answers in the place of the server."""
    message = f"the proxy {_shown(proxy)}: status {status}" + (f" ({escape(reason)})" if reason else "")
    if status == 407:
        hint = "give its user and password with it, as in HTTPS_PROXY=http://user:password@proxy:3128"
        return AuthenticationFailed(message, hint=hint)
    if status in RETRIED:
        return Transient(message)
    return NetworkFailed(message, hint="ask who runs it whether the host is allowed, or name the host in NO_PROXY")


def _shown(proxy: str) -> str:
    """Host and port, without user and password."""
    return escape(proxy.rpartition("@")[2].partition("://")[2] or proxy.rpartition("@")[2]).rstrip("/")
