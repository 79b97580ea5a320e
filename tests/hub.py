"""A small Hugging Face hub and its CDN on 127.0.0.1, which misbehave on command.

with Hub() as hub:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": weights})
    hub.faults["model.safetensors"] = [Fault("cut", at=1000), None, status(503)]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import mmap
import re
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode

Source = bytes | Path
Data = bytes | memoryview
Names = Collection[str] | None
Headers = Mapping[str, object]  # None: not sent
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt", ".model")
NEVER = 1 << 62


@dataclass(frozen=True)
class Fault:
    """One way to misbehave, with any `headers` in place of the right ones. `at` counts bytes of the body sent.

    Ending      drop: no answer. cut: FIN after `at` bytes. reset: RST. stall: silence for `value` seconds, then the
                rest. trickle: `value` seconds of silence before each byte. With `at` -1, before the answer.
    Framing     chunked. no_length: the body ends with the connection. etag: `value`, or none. headers: only them.
    Content     flip: the byte at `at` of the file. other_content: `value`, under the same ETag. longer: by the bytes
                `value`. shorter: by `at` bytes. gzip: whole and compressed. html: an error page. lfs_pointer.
    Ranges      wrong_offset: a 206 from `at` bytes further on. wrong_total: too large by `at`.
                ignore_range: the whole file. ignore_if_range: the range, whatever ETag was asked for.
    Status      status: `at`, with Retry-After `value` and `body`. redirect: to `value`, None: to itself.
    """

    kind: str
    at: int = 0
    value: Any = None
    headers: Headers = field(default_factory=dict)
    body: bytes = b""


def status(code: int, retry_after: object = None) -> Fault:
    return Fault("status", code, retry_after)


@dataclass
class Request:
    """What was asked, and how many bytes of the body of the answer went out so far."""

    server: str
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    name: str | None = None  # the file, if its content is asked for
    status: int = 0
    bytes_sent: int = 0  # that the socket took; when the client goes, up to a block (256 KiB, with a rate 1/20 s) more


@dataclass(frozen=True)
class Blob:
    """A file with its digest, SHA-256 if it is LFS and otherwise git's, and its entry in the hub's lists."""

    source: Source
    digest: str
    entry: dict[str, Any]

    @classmethod
    def of(cls, name: str, source: Source, lfs: Names) -> Blob:
        data = kept = view(source)
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
        if name in lfs if lfs is not None else name.endswith(LFS_SUFFIXES) or len(data) > 1 << 20:
            sha256 = hashlib.sha256(data).hexdigest()
            kept = lfs_pointer(sha256, len(data))
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(kept)}
        entry["oid"] = hashlib.sha1(b"".join((b"blob %d\0" % len(kept), kept))).hexdigest()
        return cls(source, entry.get("lfs", entry)["oid"], entry)


@dataclass
class Hub:
    """Serves repositories from `endpoint`, their LFS files from `cdn`, `static` files from `endpoint`/static/files/.

    Each GET of a file's content takes the next of `faults[name]` and meets `always[name]` too. Calls of the API do so
    under "api", requests to /resolve/ that are not answered with content under "resolve".
    """

    token: str | None = None  # without it, repositories are hidden, as private ones are
    page_size: int = 100
    ranges: bool = True
    rate: float | None = None  # bytes per second and connection
    relay: bool = False  # redirect files that are not LFS to another path of the hub, as huggingface.co does
    on_body: Callable[[str, int], None] = lambda name, offset: None  # called before each block of a file is sent
    static: dict[str, Source] = field(default_factory=dict)
    faults: dict[str, list[Faults]] = field(default_factory=dict)
    always: dict[str, Faults] = field(default_factory=dict)
    repos: dict[str, dict[str, tuple[str, dict[str, Blob]]]] = field(default_factory=dict)  # by name and revision
    private: dict[str, bool] = field(default_factory=dict)  # whether a repository says so; default: if there is a token
    gated: set[str] = field(default_factory=set)  # repositories whose files are refused; the API tells everything
    links: dict[str, tuple[str, Blob]] = field(default_factory=dict)  # to the CDN, by signature; clear: all expired
    log: list[Request] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)  # the hub's own, raised when it closes

    def __enter__(self) -> Self:
        self.lock, self.stopping, self.connections = threading.Lock(), threading.Event(), set[socket.socket]()
        handlers = (type(role, (self.kind,), {"hub": self}) for role in ("hub", "cdn"))
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in handlers]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            server.socket.listen(128)
            threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
        return self

    @property
    def kind(self) -> type[Handler]:
        return Handler

    def __repr__(self) -> str:
        return f"Hub of {len(self.repos)} repositories"  # not their contents, for what fails is printed

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stopping.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self.errors and error is None:
            raise self.errors[0]

    def add(self, repo: str, files: Mapping[str, Source], *, revision: str = "main", lfs: Names = None) -> str:
        """Make a commit, to which `revision` points from now on; old ones stay. `lfs` names the LFS files."""
        blobs = {name: Blob.of(name, source, lfs) for name, source in sorted(files.items())}
        commit = hashlib.sha1(json.dumps([repo, [blob.entry for blob in blobs.values()]]).encode()).hexdigest()
        self.repos.setdefault(repo, {}).update(dict.fromkeys((commit, revision), (commit, blobs)))
        return commit

    def bytes_sent(self, name: str | None = None) -> int:
        """How many bytes of this file, or of all files, went out."""
        return sum(r.bytes_sent for r in self.log if r.name is not None and name in (None, r.name))


@dataclass(frozen=True)
class Answer:
    data: Data
    status: int
    headers: Headers
    key: str = ""
    etag: str | None = None
    ranges: bool = False
    offset: int = 0
    met: Mapping[str, Fault] = field(default_factory=dict)

    def part(self, wanted: str, if_range: str | None) -> Answer:
        """The part of the file that a Range header asks for, if that is to be honoured."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
        if not self.ranges or not match or (if_range not in (None, self.etag) and "ignore_if_range" not in self.met):
            return self
        first, last, size = match[1], match[2], len(self.data)
        start = int(first) if first else size - min(size, int(last or 0))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= size:
            return replace(self, data=b"", status=416, headers={"Content-Range": f"bytes */{size}"})
        start += self.met.get("wrong_offset", Fault("")).at
        total = size + self.met.get("wrong_total", Fault("")).at
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{total}", **self.headers}
        return replace(self, data=self.data[start:stop], status=206, headers=headers, offset=start)


Faults = Fault | tuple[Fault, ...] | None  # what one request meets: a fault, several at once, or none
ENDINGS = ("drop", "cut", "reset", "stall", "trickle")
CHANGES: dict[str, Callable[[Data, Fault], dict[str, Any]]] = {
    **dict.fromkeys((*ENDINGS, "flip", "headers", "wrong_offset", "wrong_total", "ignore_if_range"), lambda *_: {}),
    "chunked": lambda d, f: {"headers": {"Content-Length": None, "Transfer-Encoding": "chunked"}},
    "no_length": lambda d, f: {"headers": {"Content-Length": None, "Connection": "close"}},
    "other_content": lambda d, f: {"data": f.value},
    "longer": lambda d, f: {"data": bytes(d) + f.value},
    "shorter": lambda d, f: {"data": d[: len(d) - f.at]},
    "gzip": lambda d, f: {"headers": {"Content-Encoding": "gzip"}, "data": zipped(d), "ranges": False},
    "html": lambda d, f: {"headers": {"Content-Type": "text/html"}, "data": b"<html>Sorry", "ranges": False},
    "lfs_pointer": lambda d, f: {"data": lfs_pointer(hashlib.sha256(d).hexdigest(), len(d)), "ranges": False},
    "etag": lambda d, f: {"etag": f.value},
    "ignore_range": lambda d, f: {"ranges": False},
    "status": lambda d, f: {"headers": {"Retry-After": f.value}, "status": f.at, "data": f.body, "ranges": False},
    "redirect": lambda d, f: {"headers": {"Location": f.value or ""}, "status": 302, "data": b"", "ranges": False},
}


def zipped(data: Data) -> bytes:
    return gzip.compress(data, 0, mtime=0)  # stored: a busy machine takes too long to compress some MiB


def lfs_pointer(sha256: str, nbytes: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {nbytes}\n".encode()


def view(source: Source) -> Data:  # without a copy; a large file is not loaded
    if isinstance(source, bytes):
        return source
    with source.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if source.stat().st_size else b""


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.answer = Answer(json.dumps({"error": message}).encode(), status, headers)


class Handler(BaseHTTPRequestHandler):
    hub: Hub  # each server has a subclass, named as its role is
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        self.hub.connections.add(self.connection)
        self.close_connection = False
        try:
            while not self.hub.stopping.is_set() and not self.close_connection:
                self.handle_one_request()
        except ConnectionError:
            pass
        except Exception as error:  # in a thread, where nobody sees it: raised when the hub closes
            self.hub.errors.append(error)

    def do_GET(self) -> None:
        self.route, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        asked = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Request(type(self).__name__, self.command, self.path, asked)
        if not self.route.startswith("/_"):
            self.hub.log.append(self.seen)
        try:
            answer = self.find()
        except Refused as refused:
            answer = refused.answer
        with self.hub.lock:
            queue = self.hub.faults.get(answer.key)
            met = (self.hub.always.get(answer.key), queue.pop(0) if queue else None)
        for fault in [f for some in met for f in (some if isinstance(some, tuple) else (some,)) if f is not None]:
            changes = {"headers": {}, **CHANGES[fault.kind](answer.data, fault)}
            headers = {**answer.headers, **changes.pop("headers"), **fault.headers}
            answer = replace(answer, met={**answer.met, fault.kind: fault}, headers=headers, **changes)
        self.send(answer.part(asked.get("range", ""), asked.get("if-range")))

    do_HEAD = do_GET

    def find(self) -> Answer:
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, self.seen.server + self.route):
                return answer(self, **{name: unquote(value) for name, value in match.groupdict("main").items()})
        raise Refused(404, "Not Found")

    def report(self, what: str) -> Answer:
        counts = {r.name: self.hub.bytes_sent(r.name) for r in self.hub.log if r.name}
        return self.json(counts if what == "bytes" else [asdict(r) for r in self.hub.log], "")

    def plain_file(self, name: str) -> Answer:
        if (source := self.hub.static.get(name)) is None:
            raise Refused(404, "Not Found")
        version = hash(source) if isinstance(source, bytes) else source.stat().st_mtime_ns
        return self.content(name, source, f"{version:x}")

    def revision(self, repo: str, rev: str) -> Answer:
        commit, files = self.commit(repo, rev)
        about = {
            "private": self.hub.private.get(repo, self.hub.token is not None),
            "gated": repo in self.hub.gated and "manual",
        }
        return self.json({"id": repo, "sha": commit, **about, "siblings": [{"rfilename": n} for n in files]}, "api")

    def tree(self, repo: str, rev: str) -> Answer:
        _, files = self.commit(repo, rev)
        folders = {name[:i] for name in files for i, char in enumerate(name) if char == "/"} - set(files)
        entries = [blob.entry for blob in files.values()]
        entries += [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        if self.query.get("recursive", "").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"]]
        start = int(self.query.get("cursor", "0"))
        stop = start + self.hub.page_size
        link = f'<{self.hub.endpoint}{self.route}?{urlencode({**self.query, "cursor": stop})}>; rel="next"'
        return self.json(entries[start:stop], "api", Link=link if stop < len(entries) else None)

    def resolve(self, repo: str, rev: str, name: str) -> Answer:
        commit, files = self.commit(repo, rev)
        if repo in self.hub.gated:
            raise Refused(403 if "authorization" in self.seen.headers else 401, "Access is restricted", "GatedRepo")
        if name not in files:
            raise Refused(404, "Entry not found", "EntryNotFound", commit)
        blob = files[name]
        headers = {"X-Repo-Commit": commit, "X-Linked-Size": blob.entry["size"], "X-Linked-ETag": f'"{blob.digest}"'}
        if "lfs" in blob.entry:
            self.hub.links[signature := secrets.token_hex()] = name, blob
            code, location = 302, f"{self.hub.cdn}/{blob.digest}?signature={signature}"
        elif self.hub.relay and "etag" not in self.query:
            code, location = 307, f"/{repo}/resolve/{commit}/{quote(name)}?etag={blob.digest}"
        else:
            answer = self.content(name, blob.source, blob.digest, {"X-Repo-Commit": commit})
            return answer if self.command == "GET" else replace(answer, key="resolve")
        return Answer(b"Redirecting", code, {**headers, "Location": location}, "resolve")

    def stored(self, digest: str) -> Answer:
        name, blob = self.hub.links.get(self.query.get("signature", ""), ("", None))
        if blob is None or blob.digest != digest:
            raise Refused(403, "Access denied")
        return self.content(name, blob.source, digest)

    def commit(self, repo: str, rev: str) -> tuple[str, dict[str, Blob]]:  # for those who may know of it
        sent, token = self.seen.headers.get("authorization"), self.hub.token
        if token is not None and sent not in (None, f"Bearer {token}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        if repo not in self.hub.repos or (token is not None and sent is None):
            raise Refused(401 if sent is None else 404, "Repository not found", "RepoNotFound")
        if rev not in self.hub.repos[repo]:
            raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return self.hub.repos[repo][rev]

    def json(self, value: object, key: str, **headers: object) -> Answer:
        return Answer(json.dumps(value).encode(), 200, {"Content-Type": "application/json", **headers}, key)

    def content(self, name: str, source: Source, digest: str, headers: Headers | None = None) -> Answer:
        self.seen.name = name if self.command == "GET" else None
        headers = {"Accept-Ranges": "bytes" if self.hub.ranges else None, **(headers or {})}
        return Answer(view(source), 200, headers, self.seen.name or "", f'"{digest}"', self.hub.ranges)

    def send(self, answer: Answer) -> None:
        self.seen.status = answer.status
        ending = next((answer.met[kind] for kind in ENDINGS if kind in answer.met), Fault("", NEVER))
        if ((left := ending.at) < 0 or ending.kind == "drop") and not (left := self.after(ending)):
            return
        self.send_response_only(answer.status)
        for name, value in {"Content-Length": len(answer.data), "ETag": answer.etag, **answer.headers}.items():
            if value is not None:
                self.send_header(name, str(value).encode().decode("latin-1"))
        self.end_headers()
        data, sent, began = memoryview(answer.data if self.command != "HEAD" else b""), 0, time.monotonic()
        flipped = answer.met.get("flip", Fault("", NEVER)).at - answer.offset
        rate, chunk = self.hub.rate or NEVER, b"%x\r\n%b\r\n" if "chunked" in answer.met else b""
        while sent < len(data):
            if not (left := left or self.after(ending)):
                return
            piece = data[sent : sent + min(left, 256 << 10, max(1, int(rate / 20)))]
            if sent <= flipped < sent + len(piece):
                piece = memoryview(bytearray(piece))
                piece[flipped - sent] ^= 0xFF
            self.hub.on_body(self.seen.name or "", answer.offset + sent)
            self.seen.bytes_sent += len(piece)  # first: a client that has it finds it counted
            self.wfile.write(chunk % (len(piece), bytes(piece)) if chunk else piece)
            sent, left = sent + len(piece), left - len(piece)
            self.wait(began + sent / rate - time.monotonic())
        self.wfile.write(b"0\r\n\r\n" if chunk and self.command == "GET" else b"")

    def after(self, ending: Fault) -> int:
        """How many bytes go out after what was to happen here."""
        if ending.kind in ("stall", "trickle"):
            self.wait(ending.value)
            return 1 if ending.kind == "trickle" else NEVER
        self.close_connection = True
        if ending.kind == "reset":
            time.sleep(0.05)  # RST discards what is still on its way
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        return 0

    def wait(self, seconds: float) -> None:
        """Sleep; the connection becomes readable when the client goes or the hub stops."""
        if seconds > 0 and select.select([self.connection], [], [], seconds)[0]:
            raise ConnectionAbortedError


REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
ROUTES: dict[str, Callable[..., Answer]] = {
    r"hub/_(?P<what>bytes|log)": Handler.report,
    r"hub/static/files/(?P<name>.+)": Handler.plain_file,
    rf"hub/api/models/{REPO}/tree/(?P<rev>[^/]+)": Handler.tree,
    rf"hub/api/models/{REPO}(?:/revision/(?P<rev>[^/]+))?": Handler.revision,
    rf"hub/{REPO}/resolve/(?P<rev>[^/]+)/(?P<name>.*)": Handler.resolve,
    r"cdn/(?P<digest>[0-9a-f]{64})": Handler.stored,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the files of a folder until killed.")
    for option, kind in {"root": Path, "repo": str, "port-file": Path, "rate": float}.items():
        parser.add_argument(f"--{option}", type=kind, required=option != "rate")
    given = parser.parse_args()
    files = {path.relative_to(given.root).as_posix(): path for path in given.root.rglob("*") if path.is_file()}
    with Hub(rate=given.rate, static=dict(files)) as hub, suppress(KeyboardInterrupt):
        hub.add(given.repo, files)
        (partial := given.port_file.with_suffix(".part")).write_text(hub.endpoint.rpartition(":")[2])
        partial.rename(given.port_file)
        threading.Event().wait()


if __name__ == "__main__":
    main()
