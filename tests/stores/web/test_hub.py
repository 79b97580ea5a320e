"""The hub that other tests download from is one to huggingface_hub, and its faults are what they say."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub import Fault, Faults, Hub, status
from huggingface_hub import HfApi, RepoFolder, close_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = random.Random(0).randbytes(600_000)
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "config.json": b"{}",
    "empty": b"",
    "model.safetensors": WEIGHTS,
    "sub/a b%20é#?.txt": b"hello\n",
    "sub/deep/tokenizer.model": b"tokens",
}


@pytest.fixture(autouse=True)
def _huggingface(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    yield
    close_session()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def snapshot(hub: Hub, out: Path, **options: Any) -> dict[str, bytes]:
    """What huggingface_hub makes of org/model."""
    out = out / "snapshot"
    snapshot_download("org/model", local_dir=out, cache_dir=out.with_name("cache"), endpoint=hub.endpoint, **options)
    found = [path for path in out.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def ask(
    url: str, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body, by a client that follows and repairs nothing."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("relay", [False, True])
def test_files_arrive_as_they_are(hub: Hub, tmp_path: Path, relay: bool) -> None:
    hub.relay = relay
    hub.add("org/model", FILES)
    assert snapshot(hub, tmp_path) == FILES


def test_a_file_on_disk_is_served_as_one_in_memory_is(hub: Hub, tmp_path: Path) -> None:
    paths = {name: tmp_path / str(i) for i, name in enumerate(FILES)}
    for name, path in paths.items():
        path.write_bytes(FILES[name])
    assert hub.add("org/model", paths) == hub.add("org/model", FILES)
    hub.add("org/model", paths)
    assert snapshot(hub, tmp_path) == FILES


def test_the_listing_comes_in_pages(hub: Hub) -> None:
    hub.page_size = 3
    hub.add("org/model", FILES)
    listed = list(HfApi(hub.endpoint).list_repo_tree("org/model", recursive=True))
    assert {entry.path for entry in listed} == {*FILES, "sub", "sub/deep"}
    assert {entry.path for entry in listed if isinstance(entry, RepoFolder)} == {"sub", "sub/deep"}
    assert len(hub.log) == 3


def test_the_listing_gives_sizes_and_digests(hub: Hub) -> None:
    hub.add("org/model", {"a.txt": b"hello\n", "b.bin": b"hello\n"})
    small, large = HfApi(hub.endpoint).list_repo_tree("org/model")
    assert not isinstance(small, RepoFolder)
    assert not isinstance(large, RepoFolder)
    assert (small.size, small.blob_id, small.lfs) == (6, "ce013625030ba8dba906f756967f9e9ca394464a", None)
    assert large.lfs is not None
    assert (large.lfs.sha256, large.lfs.size) == (hashlib.sha256(b"hello\n").hexdigest(), 6)


def test_content_changes_the_commit_and_old_commits_stay(hub: Hub, tmp_path: Path) -> None:
    old = hub.add("org/model", {"a": b"old"})
    new = hub.add("org/model", {"a": b"new"}, revision="refs/pr/1")
    api = HfApi(hub.endpoint)
    assert [api.repo_info("org/model", revision=r).sha for r in (None, "main", "refs/pr/1")] == [old, old, new]
    for revision, content in ((old, b"old"), (new, b"new"), ("refs/pr/1", b"new")):
        path = hf_hub_download("org/model", "a", revision=revision, cache_dir=tmp_path, endpoint=hub.endpoint)
        assert Path(path).read_bytes() == content


@pytest.mark.parametrize(
    ("repo", "name", "revision", "token", "kind", "code"),
    [
        ("org/model", "a", "main", False, RepositoryNotFoundError, 401),
        ("org/model", "a", "main", "wrong", HfHubHTTPError, 401),
        ("org/none", "a", "main", False, RepositoryNotFoundError, 401),
        ("org/none", "a", "main", "right", RepositoryNotFoundError, 404),
        ("org/gated", "a", "main", "right", GatedRepoError, 403),
        ("org/model", "a", "none", "right", RevisionNotFoundError, 404),
        ("org/model", "none", "main", "right", EntryNotFoundError, 404),
    ],
)
def test_refusals_are_told_apart(
    hub: Hub, tmp_path: Path, repo: str, name: str, revision: str, token: str | bool, kind: type, code: int
) -> None:
    hub.token = "right"
    hub.add("org/model", {"a": b"a"})
    hub.add("org/gated", {"a": b"a"})
    hub.gated.add("org/gated")
    with pytest.raises(HfHubHTTPError) as caught:
        hf_hub_download(repo, name, revision=revision, token=token, local_dir=tmp_path, endpoint=hub.endpoint)
    error = caught.value if isinstance(caught.value, kind) else caught.value.__cause__
    assert isinstance(error, kind)
    assert isinstance(error, HfHubHTTPError)
    assert error.response.status_code == code


def test_a_gated_repository_is_listed_for_all_and_its_files_are_for_none(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", FILES)
    hub.gated.add("org/model")
    assert HfApi(hub.endpoint, token=False).repo_info("org/model").gated == "manual"
    with pytest.raises(GatedRepoError):
        snapshot(hub, tmp_path, token=False)


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(hub: Hub, tmp_path: Path) -> None:
    hub.token = "secret"
    hub.add("org/model", FILES)
    assert snapshot(hub, tmp_path, token="secret") == FILES
    sent = {(request.server, request.headers.get("authorization")) for request in hub.log}
    assert sent == {("hub", "Bearer secret"), ("cdn", None)}


def test_a_download_goes_on_after_an_early_fin(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)  # of its 10 MiB, it keeps no part
    hub.add("org/model", {"model.safetensors": WEIGHTS})
    hub.faults["model.safetensors"] = [Fault("cut", 200_000), Fault("cut", 300_000)]
    assert snapshot(hub, tmp_path) == {"model.safetensors": WEIGHTS}
    ranges = [request.headers.get("range") for request in hub.log if request.name]
    assert ranges == [None, "bytes=200000-", "bytes=500000-"]
    assert hub.bytes_sent() == len(WEIGHTS)


def test_the_cdn_serves_only_by_links_of_the_hub(hub: Hub) -> None:
    hub.add("org/model", {"model.safetensors": WEIGHTS})
    _, headers, _ = ask(hub.endpoint, "/org/model/resolve/main/model.safetensors", "HEAD")
    link = headers["Location"].removeprefix(hub.cdn)
    assert ask(hub.cdn, link)[2] == WEIGHTS
    assert ask(hub.cdn, f"{link}0")[0] == 403
    hub.links.clear()
    assert ask(hub.cdn, link)[0] == 403


@pytest.mark.parametrize("name", ["../x", "/x", "a\\b", "a\nb", "a\x1b[2Jb", "a\0b", "a/", "", "CON", "x" * 300])
def test_hostile_names_are_listed_as_they_are(hub: Hub, name: str) -> None:
    hub.add("org/model", {name: b"x"})
    listed = HfApi(hub.endpoint).list_repo_tree("org/model", recursive=True)
    assert name in [entry.path for entry in listed if not isinstance(entry, RepoFolder)]


DATA = bytes(range(100))
ETAG = f'"{hash(DATA):x}"'
OTHER = DATA[::-1]
Expected = tuple[int, dict[str, str | None], bytes]

RANGES: dict[str, tuple[dict[str, str], Expected]] = {
    "none": ({}, (200, {"ETag": ETAG, "Accept-Ranges": "bytes", "Content-Length": "100"}, DATA)),
    "first to last": ({"Range": "bytes=10-19"}, (206, {"Content-Range": "bytes 10-19/100"}, DATA[10:20])),
    "from": ({"Range": "bytes=90-"}, (206, {"Content-Range": "bytes 90-99/100", "ETag": ETAG}, DATA[90:])),
    "past the end": ({"Range": "bytes=90-200"}, (206, {"Content-Range": "bytes 90-99/100"}, DATA[90:])),
    "suffix": ({"Range": "bytes=-5"}, (206, {"Content-Range": "bytes 95-99/100"}, DATA[95:])),
    "behind": ({"Range": "bytes=100-"}, (416, {"Content-Range": "bytes */100"}, b"")),
    "same ETag": ({"Range": "bytes=90-", "If-Range": ETAG}, (206, {}, DATA[90:])),
    "another ETag": ({"Range": "bytes=90-", "If-Range": '"x"'}, (200, {"Content-Range": None}, DATA)),
}


@pytest.mark.parametrize("case", RANGES)
def test_ranges_are_served(hub: Hub, case: str) -> None:
    hub.static["f"] = DATA
    asked, (code, headers, body) = RANGES[case]
    assert_answered(ask(hub.endpoint, "/static/files/f", headers=asked), (code, headers, body))


def test_a_hub_may_know_no_ranges(hub: Hub) -> None:
    hub.static["f"], hub.ranges = DATA, False
    found = ask(hub.endpoint, "/static/files/f", headers={"Range": "bytes=90-"})
    assert_answered(found, (200, {"Accept-Ranges": None}, DATA))


def assert_answered(found: tuple[int, Mapping[str, str], bytes], expected: Expected) -> None:
    code, headers, body = found
    assert (code, {name: headers.get(name) for name in expected[1]}, body) == expected


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(DATA).hexdigest()}\nsize 100\n"
FAULTS: dict[str, tuple[Faults, Expected]] = {
    "chunked": (Fault("chunked"), (206, {"Transfer-Encoding": "chunked", "Content-Length": None}, DATA[90:])),
    "no_length": (Fault("no_length"), (206, {"Content-Length": None}, DATA[90:])),
    "no_length, cut": ((Fault("no_length"), Fault("cut", 4)), (206, {"Content-Length": None}, DATA[90:94])),
    "trickle": (Fault("trickle", 8, 0.001), (206, {}, DATA[90:])),
    "stall": (Fault("stall", 8, 0.001), (206, {}, DATA[90:])),
    "stall first": (Fault("stall", -1, 0.001), (206, {}, DATA[90:])),
    "flip": (Fault("flip", 95), (206, {}, DATA[90:95] + b"\xa0" + DATA[96:])),
    "flip elsewhere": (Fault("flip", 5), (206, {}, DATA[90:])),
    "other_content": (Fault("other_content", value=OTHER), (206, {"ETag": ETAG}, OTHER[90:])),
    "longer": (Fault("longer", value=b"xy"), (206, {"Content-Range": "bytes 90-101/102"}, DATA[90:] + b"xy")),
    "shorter": (Fault("shorter", 3), (206, {"Content-Range": "bytes 90-96/97"}, DATA[90:97])),
    "gzip": (Fault("gzip"), (200, {"Content-Encoding": "gzip"}, gzip.compress(DATA, 0, mtime=0))),
    "html": (Fault("html"), (200, {"Content-Type": "text/html"}, b"<html>Sorry")),
    "lfs_pointer": (Fault("lfs_pointer"), (200, {}, POINTER.encode())),
    "etag": (Fault("etag", value='"x"'), (200, {"ETag": '"x"'}, DATA)),
    "etag, kept range": ((Fault("etag"), Fault("ignore_if_range")), (206, {"ETag": None}, DATA[90:])),
    "headers": (
        Fault("headers", headers={"Content-Range": "bytes 0-9/10"}),
        (206, {"Content-Range": "bytes 0-9/10"}, DATA[90:]),
    ),
    "wrong_offset": (Fault("wrong_offset", 2), (206, {"Content-Range": "bytes 92-99/100"}, DATA[92:])),
    "wrong_total": (Fault("wrong_total", 7), (206, {"Content-Range": "bytes 90-99/107"}, DATA[90:])),
    "ignore_range": (Fault("ignore_range"), (200, {"Content-Range": None}, DATA)),
    "503": (status(503), (503, {"Retry-After": None}, b"")),
    "429": (status(429, 0), (429, {"Retry-After": "0"}, b"")),
    "a date": (
        status(503, "Fri, 31 Dec 2999 23:59:59 GMT"),
        (503, {"Retry-After": "Fri, 31 Dec 2999 23:59:59 GMT"}, b""),
    ),
    "a text": (
        Fault("status", 500, headers={"X-Error-Message": "\x1b[2J"}, body=b"\x1b]0;x\x07"),
        (500, {"X-Error-Message": "\x1b[2J"}, b"\x1b]0;x\x07"),
    ),
    "redirect": (Fault("redirect", value="file:///etc/passwd"), (302, {"Location": "file:///etc/passwd"}, b"")),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_shows_in_one_answer(hub: Hub, case: str) -> None:
    fault, expected = FAULTS[case]
    hub.static["f"] = DATA
    hub.faults["f"] = [fault]
    asked = {"Range": "bytes=90-", "If-Range": ETAG, "Accept-Encoding": "identity"}
    assert_answered(ask(hub.endpoint, "/static/files/f", headers=asked), expected)
    assert_answered(ask(hub.endpoint, "/static/files/f", headers=asked), RANGES["same ETag"][1])


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("drop"), http.client.RemoteDisconnected),
        (Fault("cut", -1), http.client.RemoteDisconnected),
        (Fault("cut", 0), http.client.IncompleteRead),
        (Fault("cut", 99), http.client.IncompleteRead),
        ((Fault("chunked"), Fault("cut", 50)), http.client.IncompleteRead),
        (Fault("reset", -1), ConnectionResetError),
        (Fault("reset", 50), ConnectionResetError),
    ],
)
def test_a_fault_breaks_the_connection(hub: Hub, fault: Faults, error: type[Exception]) -> None:
    hub.static["f"] = DATA
    hub.always["f"] = fault
    with pytest.raises(error):
        ask(hub.endpoint, "/static/files/f")
    at = fault.at if isinstance(fault, Fault) else 50
    assert hub.bytes_sent("f") == max(0, at)


def test_a_head_meets_no_fault_of_the_content(hub: Hub) -> None:
    hub.static["f"] = DATA
    hub.faults["f"] = [status(503)]
    assert ask(hub.endpoint, "/static/files/f", "HEAD")[0] == 200
    assert ask(hub.endpoint, "/static/files/f")[0] == 503


def test_the_api_and_resolve_meet_faults_too(hub: Hub) -> None:
    hub.add("org/model", FILES)
    hub.faults = {"api": [None, status(503)], "resolve": [status(429, 7)]}
    api = HfApi(hub.endpoint)
    api.repo_info("org/model")
    with pytest.raises(HfHubHTTPError, match="503"):
        api.repo_info("org/model")
    path = "/org/model/resolve/main/model.safetensors"
    assert [ask(hub.endpoint, path, "HEAD")[0] for _ in range(2)] == [429, 302]


def test_a_mistake_in_a_fault_is_not_taken_for_one() -> None:
    with pytest.raises(KeyError, match="cutt"), Hub(static={"f": DATA}, always={"f": Fault("cutt")}) as hub:
        with pytest.raises(http.client.RemoteDisconnected):
            ask(hub.endpoint, "/static/files/f")


def test_bytes_are_counted_until_the_client_goes(hub: Hub) -> None:
    hub.static["f"], hub.rate = WEIGHTS, 200_000
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
    connection.request("GET", "/static/files/f")
    response = connection.getresponse()
    response.read(30_000)
    response.close()
    connection.close()
    time.sleep(0.2)
    gone = hub.bytes_sent("f")
    assert 30_000 <= gone <= 100_000
    time.sleep(0.1)
    assert hub.bytes_sent("f") == gone


def test_it_closes_at_once_whatever_clients_do() -> None:
    with Hub(static={"f": WEIGHTS * 50}, faults={"f": [Fault("stall", 10, 60), None]}) as hub:
        clients = [http.client.HTTPConnection(hub.endpoint.removeprefix("http://")) for _ in range(3)]
        for client, path in zip(clients, ("/static/files/f", "/static/files/f", "/static/files/none"), strict=True):
            client.request("GET", path)
        answers = [client.getresponse() for client in clients]
        began = time.monotonic()
    assert time.monotonic() - began < 0.5
    for answer in answers:
        answer.close()
    for client in clients:
        client.close()


def test_it_serves_a_folder_as_a_process(tmp_path: Path) -> None:
    root, port = tmp_path / "root", tmp_path / "port"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "model.bin").write_bytes(WEIGHTS)
    options = ["--root", str(root), "--repo", "org/model", "--port-file", str(port), "--rate", "1e9"]
    with subprocess.Popen([sys.executable, str(Path(__file__).parents[2] / "hub.py"), *options]) as process:
        try:
            while not port.exists():
                assert process.poll() is None
                time.sleep(0.01)
            endpoint = f"http://127.0.0.1:{port.read_text()}"
            path = hf_hub_download("org/model", "sub/model.bin", local_dir=tmp_path, endpoint=endpoint)
            assert Path(path).read_bytes() == WEIGHTS
            assert ask(endpoint, "/static/files/sub/model.bin")[2] == WEIGHTS
            assert json.loads(ask(endpoint, "/_bytes")[2]) == {"sub/model.bin": 2 * len(WEIGHTS)}
            assert [r["server"] for r in json.loads(ask(endpoint, "/_log")[2])] == ["hub", "cdn", "hub"]
        finally:
            process.kill()
