"""The network as the environment describes it: hub, token and proxies."""

from __future__ import annotations

import os
import urllib.request
from urllib.parse import urlsplit

from weightops.errors import NetworkFailed, UsageError
from weightops.io.escape import escape
from weightops.remote.policy import Policy
from weightops.remote.web import DEFAULT_ENDPOINT, Web


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE asks that no server be asked."""
    return _is_set("HF_HUB_OFFLINE")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def open_web(*, endpoint: str | None = None, policy: Policy | None = None) -> Web:
    """Connections to the hub at `endpoint` or HF_ENDPOINT, with the token of HF_TOKEN or the token file.

    HF_HUB_DISABLE_IMPLICIT_TOKEN leaves the token out. Raises `NetworkFailed` if HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import get_token

    if is_offline():
        raise NetworkFailed(
            "HF_HUB_OFFLINE is set, and this needs the network", hint="unset it, or name something on this machine"
        )
    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    token = None if _is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") else get_token()
    return Web(policy, endpoint=endpoint, token=token, proxy_for=proxy_for)


def proxy_for(url: str) -> str | None:
    """The proxy for a URL by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY; raises `UsageError` for a SOCKS proxy."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    scheme, found, _ = proxy.partition("://")
    if found and scheme.lower() not in ("http", "https"):
        raise UsageError(f"a {escape(scheme)} proxy is not used", hint="name an http proxy, or the host in NO_PROXY")
    return proxy if found else f"http://{proxy}"
