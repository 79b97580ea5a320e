"""Hugging Face hubs: which commit a revision is, and which files it has.

Two calls of the hub's API, asked through `Web`: huggingface_hub's client would follow a listing to any other server
with the token, and wait for as long as a server wishes. Names and answers are those of its `HfApi.repo_info`,
`list_repo_tree` and `hf_hub_url`, which the tests hold them against.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from weightops.errors import CorruptInput, NetworkFailed, SourceMissing, UsageError
from weightops.io.escape import escape
from weightops.stores.web.calls import decode
from weightops.stores.web.http import Http
from weightops.stores.web.listing import HubFile, HubRepository, Listing, RemoteFile, is_commit
from weightops.stores.web.small import ask
from weightops.stores.web.urls import origin, show

_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NEXT = re.compile(r'<([^<>]*)>\s*;\s*rel="?next"?')
_MAX_FILES = 100_000
_MODELS = "/api/models/"
Answer = TypeVar("Answer")


class _Lfs(msgspec.Struct):
    oid: str


class _Entry(msgspec.Struct):
    type: str
    path: str
    size: int = 0
    oid: str = ""
    lfs: _Lfs | None = None


class _Revision(msgspec.Struct):
    sha: str
    id: str = ""
    private: bool = False


@dataclass(frozen=True, slots=True)
class Repository:
    """What a hub says of a repository: its present name, whether it is `private`, and the commit of a revision."""

    name: str
    private: bool
    commit: str


def find_repository(repository: HubRepository, web: Http) -> Repository:
    """What the hub says of a repository as a whole, and the commit of its main branch; raises as `find_commit` does."""
    endpoint = repository.endpoint or web.endpoint
    found = _ask(repository, f"{endpoint}{_MODELS}{repository.name}", web, _Revision)[0]
    return Repository(found.id or repository.name, found.private, found.sha)


def find_commit(repository: HubRepository, web: Http) -> str:
    """The commit that the revision is now: one request, or none if it is a commit itself.

    Raises `SourceMissing`, `AuthenticationFailed`, `NetworkFailed`.
    """
    if is_commit(repository.revision):
        return repository.revision
    endpoint = repository.endpoint or web.endpoint
    url = f"{endpoint}{_MODELS}{repository.name}/revision/{quote(repository.revision, safe='')}"
    commit = _ask(repository, url, web, _Revision)[0].sha
    if not is_commit(commit):
        raise NetworkFailed(f"{repository}: the hub names no commit for {escape(repository.revision)}")
    return commit


def list_commit(repository: HubRepository, commit: str, web: Http) -> Listing:
    """The files of a commit, below the repository's folder if that is meant, with sizes and digests.

    Raises as `find_commit` does, `CorruptInput` for odd listings.
    """
    endpoint = repository.endpoint or web.endpoint
    url = f"{endpoint}{_MODELS}{repository.name}/tree/{commit}?recursive=true&expand=false"
    seen: set[str] = set()
    files: list[RemoteFile] = []
    while url:
        seen.add(url)
        entries, headers = _ask(repository, url, web, list[_Entry])
        files += [_file(entry, repository, commit, endpoint) for entry in entries if entry.type == "file"]
        if len(files) > _MAX_FILES:
            raise UsageError(f"{repository}: more than {_MAX_FILES} files")
        following = _NEXT.search(headers.get("Link", ""))
        url = _next_page(url, following[1], endpoint) if following else ""
        if url in seen:
            raise CorruptInput(f"{repository}: its listing goes on in circles")
    if repository.folder:
        files = [file for file in files if file.name.startswith(f"{repository.folder}/")]
        if not files:
            raise SourceMissing(f"{repository}: no such folder at {escape(repository.revision)}")
    return Listing(str(repository), tuple(files), commit, repository.revision)


def find_file(file: HubFile, commit: str, web: Http) -> RemoteFile:
    """A file of a commit by its own name, without the folder that it lies in; raises as `list_commit` does."""
    found = next((f for f in list_commit(file.repository, commit, web).files if f.name == file.path), None)
    if found is None:
        raise SourceMissing(f"{file}: no such file at {escape(file.repository.revision)}")
    return replace(found, name=file.file_name)


def _next_page(url: str, link: str, endpoint: str) -> str:
    """Where a listing goes on: a mirror that passes on the hub's own link means the same page of itself.

    Raises `CorruptInput` for a link to anything but a listing.
    """
    try:
        target = urljoin(url, link)
        origin(target)
        parts = urlsplit(target)
    except (ValueError, UsageError):
        raise CorruptInput(f"{show(url)}: the listing goes on at {escape(link)}, which is not followed") from None
    _, api, page = parts.path.partition(_MODELS)
    if "/tree/" not in page:
        raise CorruptInput(f"{show(url)}: the listing goes on at {show(target)}, which is not followed")
    return f"{endpoint}{api}{page}?{parts.query}"


def _file(entry: _Entry, repository: HubRepository, commit: str, endpoint: str) -> RemoteFile:
    digest = {"sha256": entry.lfs.oid} if entry.lfs else {"git_sha1": entry.oid}
    known = _SHA256.fullmatch(entry.lfs.oid) if entry.lfs else _SHA1.fullmatch(entry.oid)
    if not known or entry.size < 0:
        raise CorruptInput(f"{repository}: lists {escape(entry.path)} without a size or digest")
    url = file_url(repository.name, entry.path, commit, endpoint)
    return RemoteFile(entry.path, url, entry.size, digest, git_oid=entry.oid)


def file_url(repository: str, name: str, commit: str, endpoint: str) -> str:
    """Where a hub serves a file, as `hf_hub_url` says."""
    return f"{endpoint}/{repository}/resolve/{quote(commit, safe='')}/{quote(name)}"


def _ask(repository: HubRepository, url: str, web: Http, kind: type[Answer]) -> tuple[Answer, Mapping[str, str]]:
    """The hub's answer as a value of `kind`, and its headers; what makes no sense is asked for again."""

    def call() -> tuple[Answer, Mapping[str, str]]:
        data, headers = ask(url, web)
        return decode(data, url, kind), headers

    return web.retried(str(repository), call)
