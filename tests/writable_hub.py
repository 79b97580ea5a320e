"""The hub of `hub`, which can be written to: the endpoints that huggingface_hub uses to send files without Xet.

with WritableHub(token="hf_x") as hub:
    hub.faults["commit"] = [status(503)]     # also "create", "preupload", "batch", "complete", "verify", "put"
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

from hub import LFS_SUFFIXES, REPO, Answer, Blob, Fault, Handler, Hub, Refused

_PIECE_NBYTES = 64 << 10


@dataclass
class WritableHub(Hub):
    """A hub on which "me" has the token, who is in some organisations."""

    organizations: tuple[str, ...] = ("org",)
    chunk_nbytes: int | None = None  # larger contents are sent in parts of so many bytes
    room_nbytes: int = 1 << 40
    ignored: set[str] = field(default_factory=set)  # by .gitignore
    contents: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  # by upload
    commits: list[dict[str, Any]] = field(default_factory=list)  # that were made by calls: message, parent, names
    received: dict[str, int] = field(default_factory=dict)  # bytes of contents, by SHA-256
    on_upload: Callable[[str, int], None] = lambda oid, nbytes: None  # called before each piece is taken
    change_batch: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer

    @property
    def kind(self) -> type[Handler]:
        return WritingHandler

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        return {name: bytes(blob.source) for name, blob in self.repos[repo][revision][1].items()}

    def commit(self, repo: str, revision: str, files: dict[str, Blob], message: str, names: list[str]) -> str:
        """Another commit on a branch."""
        parent = self.repos[repo][revision][0] if repo in self.repos else ""
        oid = hashlib.sha1(f"{repo}{parent}{len(self.commits)}".encode()).hexdigest()
        self.repos.setdefault(repo, {}).update(dict.fromkeys((oid, revision), (oid, files)))
        self.commits.append({"message": message, "parent": parent, "names": names})
        return oid


class WritingHandler(Handler):
    hub: WritableHub

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            raise ConnectionAbortedError
        self.do_GET()

    def do_PUT(self) -> None:
        oid, left, data = self.path.partition("?")[0].split("/")[2], int(self.headers["Content-Length"]), bytearray()
        while left:
            self.hub.on_upload(oid, self.hub.received.get(oid, 0))
            piece = self.rfile.read(min(left, _PIECE_NBYTES))
            if not piece:
                raise ConnectionAbortedError
            data += piece
            left -= len(piece)
            self.hub.received[oid] = self.hub.received.get(oid, 0) + len(piece)
        self.body = bytes(data)
        self.do_GET()

    def find(self) -> Answer:
        for pattern, (key, answer) in WRITING.items():
            if match := re.fullmatch(pattern, f"{self.command} {self.seen.server}{self.route}"):
                queue = self.hub.faults.get(key) or [None]
                if any(
                    isinstance(fault, Fault) and fault.kind == "status"
                    for fault in (queue[0], self.hub.always.get(key))
                ):
                    return Answer(b"", 200, {}, key)  # what is refused is not done
                found = answer(self, **{name: unquote(value) for name, value in match.groupdict("main").items()})
                return replace(found, key=key)
        return super().find()

    def allow(self) -> None:
        sent = self.seen.headers.get("authorization")
        if sent != f"Bearer {self.hub.token}":
            raise Refused(401, "Invalid credentials in Authorization header")

    def whoami(self) -> Answer:
        self.allow()
        return self.json(
            {"type": "user", "name": "me", "orgs": [{"name": each} for each in self.hub.organizations]}, ""
        )

    def create(self) -> Answer:
        self.allow()
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        if asked["organization"] not in (None, "me", *self.hub.organizations):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {repo}")
        if repo in self.hub.repos:
            raise Refused(409, "You already created this model repo")
        self.hub.private[repo] = asked["visibility"] == "private"
        self.hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.json({"url": f"{self.hub.endpoint}/{repo}"}, "")

    def preupload(self, repo: str, rev: str) -> Answer:
        self.allow()
        self.commit(repo, rev)
        files = []
        for file in json.loads(self.body)["files"]:
            assert len(base64.b64decode(file["sample"])) == min(512, file["size"])
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 << 20
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in self.hub.ignored})
        return self.json({"files": files, "commitOid": "0" * 40}, "")

    def batch(self, repo: str) -> Answer:
        self.allow()
        self.commit(repo, "main")
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            if size > self.hub.room_nbytes:
                error = {"code": 507, "message": "Storage limit reached"}
                objects.append({"oid": oid, "size": size, "error": error})
                continue
            if oid in self.hub.contents:
                objects.append({"oid": oid, "size": size})
                continue
            upload, chunk = secrets.token_hex(8), self.hub.chunk_nbytes
            actions: dict[str, Any] = {"verify": {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"}}
            if chunk is None or size <= chunk:
                actions["upload"] = {"href": f"{self.hub.cdn}/put/{oid}?X-Amz-Signature={upload}"}
            else:
                self.hub.parts[upload] = {}
                parts = range(1, -(-size // chunk) + 1)
                header = {f"{n:05d}": f"{self.hub.cdn}/part/{oid}/{n}?upload={upload}" for n in parts}
                href = f"{self.hub.endpoint}/api/complete_multipart/{upload}"
                actions["upload"] = {"href": href, "header": {"chunk_size": str(chunk), **header}}
            objects.append({"oid": oid, "size": size, "authenticated": True, "actions": actions})
        return self.json(self.hub.change_batch({"transfer": "basic", "objects": objects}), "")

    def put(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "XAmzContentSHA256Mismatch")
        answer = Answer(b"", 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})
        self.hub.contents[oid] = self.body
        return answer

    def part(self, oid: str, number: str) -> Answer:
        self.hub.parts[self.query["upload"]][int(number)] = self.body
        return Answer(b"", 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, upload: str) -> Answer:
        asked, parts = json.loads(self.body), self.hub.parts[upload]
        etags = [f'"{hashlib.md5(parts[n]).hexdigest()}"' for n in sorted(parts)]
        assert asked["parts"] == [{"partNumber": n, "etag": etag} for n, etag in enumerate(etags, 1)]
        data = b"".join(parts[n] for n in sorted(parts))
        if hashlib.sha256(data).hexdigest() != asked["oid"]:
            raise Refused(400, "the content has another digest")
        self.hub.contents[asked["oid"]] = data
        return self.json({"success": True}, "")

    def verify(self, repo: str) -> Answer:
        self.allow()
        asked = json.loads(self.body)
        if len(self.hub.contents.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such content")
        return self.json({}, "")

    def make_commit(self, repo: str, rev: str) -> Answer:
        self.allow()
        with self.hub.lock:
            at, files = self.commit(repo, rev)
            header, *lines = [json.loads(line) for line in self.body.splitlines()]
            assert header["key"] == "header"
            if header["value"].get("parentCommit", at) != at:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files, names = dict(files), []
            for line in lines:
                value = line["value"]
                names.append(value["path"])
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                    continue
                is_lfs = line["key"] == "lfsFile"
                data = self.hub.contents.get(value["oid"]) if is_lfs else base64.b64decode(value["content"])
                if data is None:
                    raise Refused(400, f"{value['path']}: no content {value['oid']}")
                files[value["path"]] = Blob.of(value["path"], data, {value["path"]} if is_lfs else ())
            oid = self.hub.commit(repo, rev, dict(sorted(files.items())), header["value"]["summary"], names)
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        return self.json({"commitUrl": url, "commitOid": oid, "success": True}, "")


WRITING: dict[str, tuple[str, Callable[..., Answer]]] = {
    r"GET hub/api/whoami-v2": ("whoami", WritingHandler.whoami),
    r"POST hub/api/validate-yaml": ("validate", lambda self: self.json({"errors": [], "warnings": []}, "")),
    r"POST hub/api/repos/create": ("create", WritingHandler.create),
    rf"POST hub/api/models/{REPO}/preupload/(?P<rev>[^/]+)": ("preupload", WritingHandler.preupload),
    rf"POST hub/api/models/{REPO}/commit/(?P<rev>[^/]+)": ("commit", WritingHandler.make_commit),
    rf"POST hub/{REPO}\.git/info/lfs/objects/batch": ("batch", WritingHandler.batch),
    rf"POST hub/{REPO}\.git/info/lfs/verify": ("verify", WritingHandler.verify),
    r"POST hub/api/complete_multipart/(?P<upload>\w+)": ("complete", WritingHandler.complete),
    r"PUT cdn/put/(?P<oid>\w+)": ("put", WritingHandler.put),
    r"PUT cdn/part/(?P<oid>\w+)/(?P<number>\d+)": ("put", WritingHandler.part),
}
"""By method and path: under what faults go, and what answers."""
