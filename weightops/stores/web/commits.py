"""Commits on a hub: who asks, making a repository, and files that appear all at once.

The calls are those of huggingface_hub's `HfApi.whoami`, `create_repo` and `create_commit`, whose client the tests run
against the same stand-in. A commit names its parent, so that sending it again can never make a second one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal
from urllib.parse import quote

import msgspec

from weightops.errors import AuthenticationFailed, CorruptInput, Differs, UsageError
from weightops.io.escape import escape
from weightops.stores.outgoing import Outgoing
from weightops.stores.web.calls import call, decode, post
from weightops.stores.web.http import Http
from weightops.stores.web.listing import HubRepository, is_commit
from weightops.stores.web.policy import Transient

_SAMPLE_NBYTES = 512
_MAX_FILES = 256
"""As many as are asked for at a time."""
_MOVED, _BUSY, _TAKEN = 412, 409, 409
Mode = Literal["lfs", "regular"]


class _Organization(msgspec.Struct):
    name: str


class _Who(msgspec.Struct):
    name: str
    orgs: list[_Organization] = []


class _Upload(msgspec.Struct, rename="camel"):
    path: str
    upload_mode: Mode
    should_ignore: bool = False


class _Uploads(msgspec.Struct):
    files: list[_Upload]


class _Commit(msgspec.Struct, rename="camel"):
    commit_oid: str


def who(web: Http) -> tuple[str, tuple[str, ...]]:
    """Whose the token is, and the organisations of that person. Raises `AuthenticationFailed`, `NetworkFailed`."""
    if not web.token:
        raise AuthenticationFailed(
            "sending something to a hub needs a token, and there is none", hint="set HF_TOKEN, or run: hf auth login"
        )
    url = f"{web.endpoint}/api/whoami-v2"
    found = web.retried(url, lambda: decode(call(web, "GET", url).data, url, _Who))
    return found.name, tuple(each.name for each in found.orgs)


def create_repository(repository: HubRepository, *, is_private: bool, web: Http) -> bool:
    """Make a repository; False if there is one meanwhile. Raises as `who` does."""
    owner, _, name = repository.name.partition("/")
    url = f"{repository.endpoint or web.endpoint}/api/repos/create"
    visibility = "private" if is_private else "public"
    document = {"name": name, "organization": owner, "type": "model", "visibility": visibility}
    return web.retried(str(repository), lambda: post(web, url, document, allowed=(_TAKEN,)).status != _TAKEN)


def modes(files: Sequence[Outgoing], repository: HubRepository, web: Http) -> dict[str, Mode]:
    """How each file is to be sent: its content for itself, or as a part of the commit.

    Raises as `who` does, `UsageError` for files that the repository's .gitignore leaves out.
    """
    found: dict[str, Mode] = {}
    for start in range(0, len(files), _MAX_FILES):
        answer = web.retried(str(repository), partial(_ask_modes, files[start : start + _MAX_FILES], repository, web))
        for each in answer.files:
            if each.should_ignore:
                raise UsageError(
                    f"{repository}: its .gitignore leaves out {escape(each.path)}, which is to be sent",
                    hint="take that line out of it",
                )
            found[each.path] = each.upload_mode
    missing = next((file.name for file in files if file.name not in found), None)
    if missing is not None:
        raise CorruptInput(f"{repository}: the hub does not say how {escape(missing)} is to be sent")
    # An object store takes no empty content.
    return {file.name: found[file.name] if file.nbytes else "regular" for file in files}


def _ask_modes(files: Sequence[Outgoing], repository: HubRepository, web: Http) -> _Uploads:
    url = f"{_api(repository, web)}/preupload/{quote(repository.revision, safe='')}"
    samples = [{"path": f.name, "sample": _base64(f.read(_SAMPLE_NBYTES)), "size": f.nbytes} for f in files]
    return decode(post(web, url, {"files": samples}).data, url, _Uploads)


def commit(
    files: Sequence[tuple[Outgoing, Mode]],
    deleted: Collection[str],
    repository: HubRepository,
    parent: str,
    message: str,
    web: Http,
) -> str | None:
    """Make one commit after `parent`: files whose contents the hub has, or that go along, and files that go away.

    None if an answer was lost and the branch has moved since: that may be this commit. Raises as `who` does, `Differs`
    if the branch has moved.
    """
    lines: list[object] = [{"key": "header", "value": {"summary": message, "description": "", "parentCommit": parent}}]
    for file, mode in files:
        if mode == "lfs":
            value = {"path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.nbytes}
            lines.append({"key": "lfsFile", "value": value})
        else:
            content = {"content": _base64(file.read()), "path": file.name, "encoding": "base64"}
            lines.append({"key": "file", "value": content})
    lines += [{"key": "deletedFile", "value": {"path": name}} for name in deleted]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    url = f"{_api(repository, web)}/commit/{quote(repository.revision, safe='')}"
    lost = False

    def attempt() -> str | None:
        nonlocal lost
        try:
            answer = call(
                web,
                "POST",
                url,
                body,
                headers={"Content-Type": "application/x-ndjson"},
                allowed=(_MOVED, _BUSY),
            )
            if answer.status == _BUSY:
                raise Transient(f"{repository}: the hub is busy with another commit")
            if answer.status != _MOVED:
                made = decode(answer.data, url, _Commit).commit_oid
                if not is_commit(made):
                    raise CorruptInput(f"{repository}: the hub names no commit")
                return made
        except Transient:
            lost = True
            raise
        if lost:
            return None
        raise moved(repository, parent)

    return web.retried(str(repository), attempt)


def moved(repository: HubRepository, parent: str) -> Differs:
    """The error for a branch that is not where it was."""
    return Differs(
        f"{repository}: {escape(repository.revision)} is not at {parent[:12]} any more: somebody has made a commit "
        "meanwhile, and nothing of ours was added",
        hint="look at it, and run the same command again: contents that the hub has are not sent again",
    )


def _api(repository: HubRepository, web: Http) -> str:
    return f"{repository.endpoint or web.endpoint}/api/models/{repository.name}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
