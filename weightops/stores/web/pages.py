"""Addresses of a hub's pages, as people copy them from a browser: what they show, rather than the page itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.stores.web.urls import origin, show

HUBS = {
    **dict.fromkeys(("huggingface.co", "www.huggingface.co", "hf.co"), ""),
    **dict.fromkeys(("hf-mirror.com", "www.hf-mirror.com"), "https://hf-mirror.com"),
}
"""Hosts that are hubs, and their endpoints: empty for the one that HF_ENDPOINT stands in for."""

_OTHER_KINDS = {"datasets": "a dataset", "spaces": "a space"}
_NO_OWNERS = ("api", "blog", "collections", "docs", "models", "papers", "settings", "tasks")
_FILES, _FOLDERS, _COMMITS = ("blob", "resolve", "raw", "blame"), ("tree",), ("commit", "commits")
_VERBS = (*_FILES, *_FOLDERS, *_COMMITS)
_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
_SLASH = r"(?:/|%2F)"
_REVISION = re.compile(rf"(refs{_SLASH}(?:pr{_SLASH}\d+|convert{_SLASH}\w+)|[^/]+)(?:/(.*))?", re.ASCII | re.IGNORECASE)
"""A revision and what follows it. One with a slash has it encoded, but for the hub's own refs."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows: `revision` if it names one, and one of `folder` and `file` if it does not show all."""

    endpoint: str
    name: str
    revision: str = ""
    folder: str = ""
    file: str = ""


def check_kind(first: str, shown: str) -> None:
    """Raise `UsageError` if a path that begins so is that of a dataset or space."""
    if kind := _OTHER_KINDS.get(first):
        raise UsageError(f"{escape(shown)} is {kind}, and only models are fetched", hint="name a model as org/name")


def parse_page(url: str, endpoint: str) -> Page | None:
    """What a URL of a hub shows; None for one that is no hub's, or of something that hubs do not have.

    Source: huggingface_hub's `HfFileSystem.resolve_path` and `repo_type_and_id_from_hf_id`, by which HF_ENDPOINT
    stands in for huggingface.co. Raises `UsageError` for pages that show no model's files.
    """
    parts = urlsplit(url)
    prefix = urlsplit(endpoint).path.rstrip("/")
    if origin(url) == origin(endpoint) and parts.path.startswith(f"{prefix}/"):
        hub, path = "", parts.path.removeprefix(prefix)
    elif (host := (parts.hostname or "").lower()) in HUBS:
        hub, path = HUBS[host], parts.path
    else:
        return None
    segments = [segment for segment in path.split("/") if segment]
    check_kind(segments[0] if segments else "", show(url))
    owned = len(segments) == 2 or (len(segments) > 2 and segments[2] in _VERBS)
    count = 2 if owned else 1 if len(segments) > 2 and segments[1] in _VERBS else 0
    name = unquote("/".join(segments[:count]))
    if not _NAME.fullmatch(name) or segments[0] in _NO_OWNERS:
        if (parts.hostname or "").lower() in HUBS:
            raise UsageError(f"{show(url)} shows no model's files", hint="name a model as org/name")
        return None
    verb = segments[count] if len(segments) > count else "tree"
    match = _REVISION.fullmatch("/".join(segments[count + 1 :]))
    if match is None:
        return Page(hub, name)
    revision, rest = unquote(match[1]), unquote(match[2] or "")
    if verb in _COMMITS:
        return Page(hub, name, revision)
    is_file = verb in _FILES and not path.endswith("/")
    return Page(hub, name, revision, "" if is_file else rest, rest if is_file else "")


def file_address(url: str, endpoint: str) -> str:
    """Where the file that a page shows is itself; any other URL as it is."""
    try:
        page = parse_page(url, endpoint)
    except UsageError:
        return url
    if page is None or not page.file:
        return url
    return f"{page.endpoint or endpoint}/{page.name}/resolve/{quote(page.revision, safe='')}/{quote(page.file)}"
