"""The network as the environment describes it: hub, token and proxies."""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from weightops.cli.hub_cache import is_offline, is_set
from weightops.errors import AuthenticationFailed, NetworkFailed, UsageError
from weightops.io.escape import escape
from weightops.stores.web.policy import Policy
from weightops.stores.web.urls import DEFAULT_ENDPOINT, origin, show
from weightops.stores.web.web import Web

if TYPE_CHECKING:
    from weightops.stores.s3.connection import S3

_ITEM = re.compile(r"(?P<host>\[[0-9a-f:.%]+\]|[^:]*)(?::(?P<port>\d{1,5}))?")


def hub_endpoint(given: str | None = None) -> str:
    """The hub to go by: the one given, HF_ENDPOINT, or huggingface.co; raises `UsageError` if it is no URL."""
    endpoint = (given or os.environ.get("HF_ENDPOINT", "")).strip() or DEFAULT_ENDPOINT
    try:
        origin(endpoint)
    except UsageError as error:
        raise UsageError(
            f"the hub ({'--endpoint' if given else 'HF_ENDPOINT'}) is no URL: {error}", hint=f"as in {DEFAULT_ENDPOINT}"
        ) from None
    return endpoint


def open_web(*, endpoint: str | None = None, policy: Policy | None = None) -> Web:
    """Connections to the hub at `endpoint` or HF_ENDPOINT, with the token of HF_TOKEN or the token file.

    HF_HUB_DISABLE_IMPLICIT_TOKEN leaves the token out. Raises `NetworkFailed` if HF_HUB_OFFLINE is set, `UsageError`
    and `AuthenticationFailed` for an endpoint or token that cannot be one.
    """
    if is_offline():
        raise NetworkFailed(
            "HF_HUB_OFFLINE is set, and this needs the network", hint="unset it, or name something on this machine"
        )
    endpoint = hub_endpoint(endpoint)
    return Web(policy, endpoint=endpoint, token=_token(), proxy_for=proxy_for)


def open_buckets(policy: Policy | None = None) -> S3:
    """Connections to buckets, as the environment and ~/.aws describe them; raises as `open_account` does."""
    from weightops.stores.s3.connection import S3  # imported here because most commands need no bucket

    return S3(policy=policy, proxy_for=proxy_for)


def token_is_set() -> bool:
    """Whether there is a token for the hub, and it is to be used."""
    try:
        return _token() is not None
    except AuthenticationFailed:
        return False


def _token() -> str | None:
    if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    from huggingface_hub import get_token

    try:
        return get_token()
    except (OSError, ValueError) as error:
        raise AuthenticationFailed(
            f"the file with the hub's token cannot be read ({escape(str(error))})", hint="hf auth login writes it again"
        ) from None


def proxy_for(url: str) -> str | None:
    """The proxy for a URL by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY.

    Raises `UsageError` for a SOCKS proxy, and for what is no URL of a proxy.
    """
    proxies = urllib.request.getproxies()
    scheme = urlsplit(url).scheme
    proxy = (proxies.get(scheme) or proxies.get("all") or "").strip()
    if not proxy or needs_no_proxy(url, proxies.get("no", "")):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    kind, _, rest = proxy.partition("://")
    if kind.lower() not in ("http", "https"):
        raise UsageError(f"a {escape(kind)} proxy is not used", hint="name an http proxy, or the host in NO_PROXY")
    bare = f"{kind}://{rest.rpartition('@')[2]}"
    try:
        if origin(bare)[1] != (urlsplit(proxy).hostname or "").lower():
            raise UsageError(f"{show(bare)} stands after a user or password with a slash or the like")
    except UsageError as error:
        raise UsageError(
            f"the proxy for {escape(scheme)} is no URL: {error}",
            hint="as in http://user:password@proxy:3128, with odd characters of a password as %23 and the like",
        ) from None
    return proxy


def needs_no_proxy(url: str, exceptions: str) -> bool:
    """Whether NO_PROXY lists the host of a URL.

    Its items are hosts, which stand for what is below them too, with a dot or `*.` before them or not, addresses,
    networks such as 10.0.0.0/8, each with a port or for all of them, and `*`. As curl and Go's httpproxy read it.
    """
    _, host, port = origin(url)
    return any(_names(item.strip(), host.rstrip("."), port) for item in re.split(r"[,\s]+", exceptions.lower()) if item)


def _names(item: str, host: str, port: int) -> bool:
    if item == "*":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None:
        with suppress(ValueError):
            return address in ipaddress.ip_network(item.strip("[]"), strict=False)
    match = _ITEM.fullmatch(item)
    if match is None or match["port"] not in (None, str(port)):
        return False
    name = match["host"].strip("[]").removeprefix("*").strip(".")
    return host == name or (address is None and bool(name) and host.endswith(f".{name}"))
