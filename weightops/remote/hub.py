"""Hugging Face hubs: which commit a revision is, and which files it has.

Two calls of the hub's API, asked through `Web`: huggingface_hub's client would follow a listing to any other server
with the token, and wait for as long as a server wishes. Names and answers are those of its `HfApi.repo_info`,
`list_repo_tree` and `hf_hub_url`, which the tests hold them against.
"""

from __future__ import annotations

import re
from typing import TypeVar
from urllib.parse import quote, urljoin

import msgspec

from weightops.errors import CorruptInput, NetworkFailed, UsageError
from weightops.io.escape import escape
from weightops.remote.listing import HubRepository, Listing, RemoteFile
from weightops.remote.policy import Transient
from weightops.remote.small import ask
from weightops.remote.urls import origin, show
from weightops.remote.web import Web

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NEXT = re.compile(r'<([^<>]*)>\s*;\s*rel="?next"?')
_MAX_FILES = 100_000
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


def is_commit(revision: str) -> bool:
    """Whether a revision can never mean anything else tomorrow."""
    return _COMMIT.fullmatch(revision) is not None


def find_commit(repository: HubRepository, web: Web) -> str:
    """The commit that the revision is now: one request, or none if it is a commit itself.

    Raises `SourceMissing`, `AuthenticationFailed`, `NetworkFailed`.
    """
    if is_commit(repository.revision):
        return repository.revision
    url = f"{web.endpoint}/api/models/{repository.name}/revision/{quote(repository.revision, safe='')}"
    commit = _ask(repository, url, web, _Revision)[0].sha
    if not is_commit(commit):
        raise NetworkFailed(f"{repository}: the hub names no commit for {escape(repository.revision)}")
    return commit


def list_commit(repository: HubRepository, commit: str, web: Web) -> Listing:
    """The files of a commit, with sizes and digests; raises as `find_commit` does, `CorruptInput` for odd listings."""
    url = f"{web.endpoint}/api/models/{repository.name}/tree/{commit}?recursive=true&expand=false"
    seen: set[str] = set()
    files: list[RemoteFile] = []
    while url:
        seen.add(url)
        entries, headers = _ask(repository, url, web, list[_Entry])
        files += [_file(entry, repository, commit, web.endpoint) for entry in entries if entry.type == "file"]
        if len(files) > _MAX_FILES:
            raise UsageError(f"{repository}: more than {_MAX_FILES} files")
        following = _NEXT.search(headers.get("Link", ""))
        try:
            url = urljoin(url, following[1]) if following else ""
            is_ours = not url or origin(url) == origin(web.endpoint)
        except (ValueError, UsageError):
            is_ours = False
        if url in seen or not is_ours:
            raise CorruptInput(f"{repository}: its listing goes on at {show(url)}, which is not followed")
    return Listing(str(repository), tuple(files), commit, repository.revision)


def _file(entry: _Entry, repository: HubRepository, commit: str, endpoint: str) -> RemoteFile:
    digest = {"sha256": entry.lfs.oid} if entry.lfs else {"git_sha1": entry.oid}
    known = _SHA256.fullmatch(entry.lfs.oid) if entry.lfs else _COMMIT.fullmatch(entry.oid)
    if not known or entry.size < 0:
        raise CorruptInput(f"{repository}: lists {escape(entry.path)} without a size or digest")
    return RemoteFile(entry.path, file_url(repository.name, entry.path, commit, endpoint), entry.size, digest)


def file_url(repository: str, name: str, commit: str, endpoint: str) -> str:
    """Where a hub serves a file, as `hf_hub_url` says."""
    return f"{endpoint}/{repository}/resolve/{quote(commit, safe='')}/{quote(name)}"


def _ask(repository: HubRepository, url: str, web: Web, kind: type[Answer]) -> tuple[Answer, dict[str, str]]:
    """The hub's answer as a value of `kind`, and its headers; what makes no sense is asked for again."""

    def call() -> tuple[Answer, dict[str, str]]:
        data, headers = ask(url, web)
        try:
            return msgspec.json.decode(data, type=kind), headers
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise Transient(f"{show(url)}: an answer without sense") from None

    return web.retried(str(repository), call)
