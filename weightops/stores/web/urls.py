"""URLs: whose they are, how to show them, and where a redirect may lead."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import lru_cache
from urllib.parse import urlsplit

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[\w.:%~-]+")

DEFAULT_ENDPOINT = "https://huggingface.co"

Origin = tuple[str, str, int]
"""Scheme, host and port."""


def is_url(text: str) -> bool:
    """Whether `text` is meant as a web address."""
    return text.lower().startswith(("http://", "https://"))


def origin(url: str) -> Origin:
    """Scheme, host and port; raises `UsageError` for anything but a plain http or https URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError(f"{show(url)}: not a URL") from None
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    if scheme not in _PORTS or not host:
        raise UsageError(f"{show(url)}: expected an http or https URL")
    try:
        odd = not _HOST.fullmatch(host) or not host.encode("idna")
    except UnicodeError:
        odd = True
    if odd:
        raise UsageError(f"{show(url)}: {escape(host)!r} is no host")
    if parts.username is not None:
        raise UsageError(f"{escape(host)}: a URL with a user name or password is not used", hint="give a token instead")
    return scheme, host, port or _PORTS[scheme]


def show(url: str) -> str:
    """A URL for people: without its query, which may hold a signature."""
    return escape(url.partition("?")[0])


def check_redirect(source: str, target: str) -> None:
    """Refuse a redirect to a lesser scheme, or from the public network into a private one."""
    shown = f"{escape(host_of(source))} redirects to {show(target)}"
    try:
        scheme, host, _ = origin(target)
    except UsageError:
        raise CorruptInput(f"{shown}: not followed, expected http or https") from None
    from_scheme, from_host, _ = origin(source)
    if from_scheme == "https" and scheme == "http":
        raise CorruptInput(f"{shown}: not followed, it leads from https to http")
    if host != from_host and is_private(host) and not is_private(from_host):
        raise CorruptInput(f"{shown}: not followed, it leads from a public host to a private one")


@lru_cache(maxsize=256)
def is_private(host: str) -> bool:
    """Whether a host is on this machine or a private network, by its address; a name that nobody knows is not."""
    try:
        addresses = [ipaddress.ip_address(host.strip("[]"))]
    except ValueError:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            return False
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    return any(not address.is_global for address in addresses)


def host_of(url: str) -> str:
    """Host and port, as the URL has them."""
    return urlsplit(url).netloc
