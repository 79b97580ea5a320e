"""What lies at a place on the network: files by name, with their sizes and digests as far as the place says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.stores.web.pages import HUBS, check_kind, parse_page
from weightops.stores.web.urls import DEFAULT_ENDPOINT, is_url, origin, show

HUB_SCHEME = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a server: `digests` are lower-case hexadecimal by algorithm; `git_sha1` is that of a git blob.

    The first digest is the source's own; others come from lists that the user goes by. `git_oid` is what a hub's git
    knows it by: of an LFS file the SHA-1 of its pointer.
    """

    name: str
    url: str
    nbytes: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    etag: str = ""
    git_oid: str = ""

    @property
    def identity(self) -> str:
        """What tells this content from another under the same name: a digest, or else the server's ETag."""
        return next(iter(self.digests.values()), self.etag)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a source: `source` names it as a user would, `commit` is the version, if it has any."""

    source: str
    files: tuple[RemoteFile, ...]
    commit: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A model repository on a Hugging Face hub, or a folder in it; `endpoint` if it is another hub than usual."""

    name: str
    revision: str = "main"
    endpoint: str = ""
    folder: str = ""

    def __str__(self) -> str:
        return escape(f"{HUB_SCHEME}{self.name}" + (f"/{self.folder}" if self.folder else ""))


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a repository."""

    repository: HubRepository
    path: str

    @property
    def file_name(self) -> str:
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.repository}/{escape(self.path)}"


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file at a URL."""

    url: str

    @property
    def file_name(self) -> str:
        return unquote(urlsplit(self.url).path).rpartition("/")[2]

    def __str__(self) -> str:
        return show(self.url)


@dataclass(frozen=True, slots=True)
class WebFolder:
    """Files below a URL that ends in a slash."""

    url: str

    def __str__(self) -> str:
        return show(self.url)


Location = HubRepository | HubFile | WebFile | WebFolder


def is_commit(revision: str) -> bool:
    """Whether a revision can never mean anything else tomorrow."""
    return _COMMIT.fullmatch(revision) is not None


def is_location(text: str) -> bool:
    """Whether `text` names something on the network rather than a path."""
    return text.startswith(HUB_SCHEME) or is_url(text)


def parse_location(text: str, revision: str | None = None, endpoint: str = DEFAULT_ENDPOINT) -> Location:
    """`hf://org/name[@revision]`, `org/name[@revision]` or an http(s) URL; a folder if that ends in a slash.

    URLs of a hub's pages mean what they show: a repository, a folder or a file of it; `endpoint` is the hub that the
    user goes by. Raises `UsageError` for anything else, and for two revisions.
    """
    if text.partition("/")[0].lower() in HUBS:
        text = f"https://{text}"
    if is_url(text):
        origin(text)
        page = parse_page(text, endpoint)
        if page is not None:
            if page.revision and revision not in (None, page.revision):
                raise UsageError(
                    f"{show(text)}: names one revision, --revision another ({escape(str(revision))})",
                    hint="leave --revision out",
                )
            repository = HubRepository(page.name, page.revision or revision or "main", page.endpoint, page.folder)
            return HubFile(repository, page.file) if page.file else repository
        if revision is not None:
            raise UsageError(f"{show(text)}: a URL has no revision")
        return WebFolder(text) if urlsplit(text).path.endswith("/") or not urlsplit(text).path else WebFile(text)
    check_kind(text.removeprefix(HUB_SCHEME).partition("/")[0], text)
    match = _REPOSITORY.fullmatch(text.removeprefix(HUB_SCHEME))
    if match is None:
        raise UsageError(f"{escape(text)!r} is no repository", hint="write org/name, org/name@revision or a URL")
    if match[2] and revision not in (None, match[2]):
        raise UsageError(f"{escape(text)}: names one revision, --revision another ({escape(str(revision))})")
    return HubRepository(match[1], match[2] or revision or "main")
