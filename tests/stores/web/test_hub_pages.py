"""Addresses of a hub as people copy them: they mean what they show, and a page is never saved as a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetching import FINAL, REPO, assert_complete, fetch, files
from hub import Fault, Hub

from weightops.cli.main import run
from weightops.errors import CorruptInput, NetworkFailed, SourceMissing, UsageError
from weightops.stores.web.hub import _next_page
from weightops.stores.web.listing import HubFile, HubRepository, WebFile, WebFolder, parse_location
from weightops.stores.web.pages import parse_page
from weightops.stores.web.urls import DEFAULT_ENDPOINT

HUB = "https://hub.example/hf"
WEIGHTS = (8).to_bytes(8, "little") + b"{}      "
MODEL = {"config.json": b"{}", "model.safetensors": WEIGHTS, "sub/a b.txt": b"a", "sub/deep/c.json": b"[]"}
PULL = "refs/pr/1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as hub:
        hub.add(REPO, MODEL)
        for revision in (PULL, "v1"):
            hub.add(REPO, {**MODEL, "config.json": revision.join('""').encode()}, revision=revision)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


BASES = ["https://huggingface.co", "https://www.huggingface.co", "https://hf.co", "http://huggingface.co", HUB]
SHOWN = {
    "/o/n": HubRepository("o/n"),
    "/o/n/": HubRepository("o/n"),
    "/o/n?library=transformers#how-to-use": HubRepository("o/n"),
    "//o//n": HubRepository("o/n"),
    "/o/n/tree/main": HubRepository("o/n"),
    "/o/n/tree/v1/": HubRepository("o/n", "v1"),
    "/o/n/tree/v1/sub/deep": HubRepository("o/n", "v1", folder="sub/deep"),
    "/o/n/tree": HubRepository("o/n"),
    "/o/n/tree/refs%2Fpr%2F1": HubRepository("o/n", PULL),
    "/o/n/tree/refs/pr/1/sub": HubRepository("o/n", PULL, folder="sub"),
    "/o/n/tree/feature%2Fx": HubRepository("o/n", "feature/x"),
    "/o/n/tree/main?show_file_info=model.safetensors": HubRepository("o/n"),
    "/o/n/commit/" + "a" * 40: HubRepository("o/n", "a" * 40),
    "/o/n/commits/v1": HubRepository("o/n", "v1"),
    "/o/n/resolve/main/": HubRepository("o/n"),
    "/o/n/resolve/main/sub/": HubRepository("o/n", folder="sub"),
    "/o/n/blob/main/config.json": HubFile(HubRepository("o/n"), "config.json"),
    "/o/n/blob/v1/sub/a%20b.txt": HubFile(HubRepository("o/n", "v1"), "sub/a b.txt"),
    "/o/n/resolve/main/x.safetensors?download=true": HubFile(HubRepository("o/n"), "x.safetensors"),
    "/o/n/resolve/refs%2Fpr%2F1/x.json": HubFile(HubRepository("o/n", PULL), "x.json"),
    "/o/n/resolve/refs/convert/parquet/x.json": HubFile(HubRepository("o/n", "refs/convert/parquet"), "x.json"),
    "/o/n/raw/main/README.md#L3": HubFile(HubRepository("o/n"), "README.md"),
    "/gpt2/resolve/main/config.json": HubFile(HubRepository("gpt2"), "config.json"),
    "/gpt2/tree/main": HubRepository("gpt2"),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("path", SHOWN)
def test_pages_mean_what_they_show(base: str, path: str) -> None:
    assert parse_location(base + path, endpoint=HUB) == SHOWN[path]


def test_mirrors_are_asked_themselves_and_hosts_need_no_scheme() -> None:
    found = parse_page("https://hf-mirror.com/o/n/tree/v1", DEFAULT_ENDPOINT)
    assert found is not None
    assert (found.endpoint, found.name, found.revision) == ("https://hf-mirror.com", "o/n", "v1")
    assert parse_location("huggingface.co/o/n/tree/v1") == HubRepository("o/n", "v1")
    assert parse_location("https://hf-mirror.com/o/n", endpoint="https://hf-mirror.com/") == HubRepository("o/n")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://huggingface.co/datasets/o/n", "is a dataset"),
        ("https://huggingface.co/spaces/o/n/blob/main/app.py", "is a space"),
        ("hf://datasets/o/n", "is a dataset"),
        ("datasets/o", "is a dataset"),
        ("https://huggingface.co/", "shows no model's files"),
        ("https://huggingface.co/o", "shows no model's files"),
        ("https://huggingface.co/o/n/discussions/1", "shows no model's files"),
        ("https://huggingface.co/docs/hub", "shows no model's files"),
        ("https://huggingface.co/api/models/o/n", "shows no model's files"),
        ("https://huggingface.co/o/%0An", "shows no model's files"),
        ("https://hf.co\u200b/o/n", "is no host"),
        ("http://a..b/x", "is no host"),
    ],
)
def test_pages_of_something_else_are_refused(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_location(source)


@pytest.mark.parametrize("url", ["https://example.org/o/n/blob/main/x.bin", "https://hub.example/other/x/y.bin"])
def test_other_servers_urls_are_files(url: str) -> None:
    assert parse_location(url, endpoint=HUB) == WebFile(url)
    assert parse_location(f"{url}/", endpoint=HUB) == WebFolder(f"{url}/")


def test_one_revision_is_enough() -> None:
    assert parse_location("https://hf.co/o/n", "v1") == HubRepository("o/n", "v1")
    assert parse_location("https://hf.co/o/n/tree/v1", "v1") == HubRepository("o/n", "v1")
    with pytest.raises(UsageError, match="names one revision, --revision another"):
        parse_location("https://hf.co/o/n/tree/v1", "v2")


ONE = {"config.json": b"{}"}
FETCHED: dict[str, dict[str, bytes]] = {
    f"/{REPO}": MODEL,
    f"/{REPO}/tree/main?x=y#z": MODEL,
    f"/{REPO}/tree/refs%2Fpr%2F1": {**MODEL, "config.json": b'"refs/pr/1"'},
    f"/{REPO}/tree/main/sub": {name: data for name, data in MODEL.items() if name.startswith("sub/")},
    f"/{REPO}/blob/main/config.json": ONE,
    f"/{REPO}/blob/v1/config.json": {"config.json": b'"v1"'},
    f"/{REPO}/resolve/main/config.json?download=true": ONE,
    f"/{REPO}/blob/main/sub/a%20b.txt": {"a b.txt": b"a"},
    f"/{REPO}/blob/main/model.safetensors": {"model.safetensors": WEIGHTS},
}


@pytest.mark.parametrize("path", FETCHED)
def test_what_a_page_shows_is_fetched_with_its_digests(hub: Hub, tmp_path: Path, path: str) -> None:
    found = fetch(hub, tmp_path / "a", hub.endpoint + path)
    assert_complete(tmp_path / "a", FETCHED[path])
    assert all(file.digests for file in found.files)
    assert found.unproven == ()
    assert run(["download", f"https://huggingface.co{path}", "--out", str(tmp_path / "b"), "-q"]) == 0
    assert_complete(tmp_path / "b", FETCHED[path])
    assert run(["download", hub.endpoint + path, "--out", str(tmp_path / "b"), "--offline"]) == 0


def test_a_digest_of_ones_own_is_held_against_a_file_of_a_hub(hub: Hub, tmp_path: Path) -> None:
    url = f"{hub.endpoint}/{REPO}/blob/main/config.json"
    assert run(["download", url, "--md5", "99914b932bd37a50b983c5e7c90ae93b", "--out", str(tmp_path / "a")]) == 0
    assert run(["download", url, "--md5", "0" * 32, "--out", str(tmp_path / "b")]) == 3


def test_pages_in_lists_are_files_too(hub: Hub, tmp_path: Path) -> None:
    page = f"{hub.endpoint}/{REPO}/blob/main"
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    (tmp_path / "list").write_text(f"{digest}  {page}/config.json\n")
    fetch(hub, tmp_path / "a", str(tmp_path / "list"))
    assert_complete(tmp_path / "a", ONE)
    hub.add(REPO, {**MODEL, "SHA256SUMS": f"{digest}  config.json\n".encode()})
    hub.static["config.json"] = b"{}"
    found = fetch(hub, tmp_path / "b", f"{hub.endpoint}/static/files/config.json", checksums=f"{page}/SHA256SUMS")
    assert found.unproven == ()


@pytest.mark.parametrize("path", ["blob/main/none", "tree/main/none", "tree/v9", "blob/v9/config.json"])
def test_what_is_not_there_is_missing(hub: Hub, tmp_path: Path, path: str) -> None:
    with pytest.raises(SourceMissing, match=r"no such (file|folder|revision)"):
        fetch(hub, tmp_path, f"{hub.endpoint}/{REPO}/{path}")


def test_checkpoints_are_opened_from_pages_too(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (8).to_bytes(8, "little") + b"{}      "
    hub.add(REPO, {"sub/config.json": b"{}", "sub/model.safetensors": data})
    for path in ("tree/main/sub", "blob/main/sub/model.safetensors"):
        assert run(["inspect", f"{hub.endpoint}/{REPO}/{path}"]) == 0
        assert "0 tensors" in capsys.readouterr().out


PAGE = b"<!doctype html><html><body>a model's page</body></html>"
NOT_THE_FILE = {
    "a page": Fault("status", 200, headers={"Content-Type": "text/html; charset=utf-8"}, body=PAGE),
    "a page that says nothing": Fault("status", 200, headers={"Content-Type": "text/plain"}, body=PAGE),
    "a login form": Fault("status", 200, headers={"Content-Type": "text/html"}, body=b"\n<form action='/login'>"),
    "a pointer": Fault("lfs_pointer"),
    "an error": Fault("status", 200, headers={"Content-Type": "application/json"}, body=b'{"error": "Invalid token"}'),
    "a text": Fault("status", 200, headers={"Content-Type": "text/plain"}, body=b"404: Not Found"),
    "an error as XML": Fault("status", 200, body=b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'),
}
NAMES = ["config.json", "tokenizer.model", "model.safetensors", "a.bin", "merges.txt", "README.md", "x", "m.gguf"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", NOT_THE_FILE)
def test_what_is_not_the_file_is_saved_under_no_name(hub: Hub, tmp_path: Path, name: str, kind: str) -> None:
    hub.static[name] = b"x"
    hub.always[name] = NOT_THE_FILE[kind]
    if kind == "a text" and name in ("merges.txt", "README.md", "x"):
        pytest.skip("this may well be the file")
    with pytest.raises(
        CorruptInput, match=r"an HTML page|an error instead of the file|pointer|this is no JSON|is text"
    ):
        fetch(hub, tmp_path, f"{hub.endpoint}/static/files/{name}")
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("page.html", PAGE),
        ("vocab.txt", b"<s>\n</s>\n<unk>"),
        ("README.md", b"<div align='center'>\n# A model"),
        ("config.json", b'\n{"error_bound": 1}'),
        ("merges.txt", b"#version: 0.2\n"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n"),
        ("data.bin", b"\x00\x01text"),
        ("empty.json", b""),
        ("number.json", b" 7\n"),
        ("cut.json", b'["' + b"x" * 5000 + b'"]'),
    ],
)
def test_what_may_look_so_is_taken_whatever_it_is_called(hub: Hub, tmp_path: Path, name: str, data: bytes) -> None:
    hub.static[name] = data
    hub.always[name] = Fault("headers", headers={"Content-Type": "text/html"} if name != "README.md" else {})
    fetch(hub, tmp_path, f"{hub.endpoint}/static/files/{name}")
    assert_complete(tmp_path, {name: data})


def test_a_server_that_answers_every_name_with_a_page_has_those_files_that_are_none(hub: Hub, tmp_path: Path) -> None:
    names = ("model.safetensors.index.json", "pytorch_model.bin", "generation_config.json", FINAL)
    hub.static |= {f"m/{name}": PAGE for name in names} | {f"m/{name}": MODEL[name] for name in list(MODEL)[:2]}
    for name in names:
        hub.always[f"m/{name}"] = Fault("headers", headers={"Content-Type": "text/html"})
    fetch(hub, tmp_path, f"{hub.endpoint}/static/files/m/")
    assert_complete(tmp_path, {name: MODEL[name] for name in list(MODEL)[:2]})


def test_a_digest_speaks_for_a_page(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"odd.json": PAGE, "config.json": b"{}"})
    fetch(hub, tmp_path)
    assert_complete(tmp_path, {"odd.json": PAGE, "config.json": b"{}"})


def test_what_nothing_proves_is_named_everywhere(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.static["a.bin"] = b"\x00"
    url = f"{hub.endpoint}/static/files/a.bin"
    for _ in range(2):
        assert run(["download", url, "--out", str(tmp_path), "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["unproven"] == ["a.bin"]
        assert "no digest of a.bin" in shown.err
    assert json.loads((tmp_path / FINAL).read_text())["recipe"]["unproven"] == ["a.bin"]
    digest = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert run(["download", url, "--sha256", digest, "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unproven"] == []
    assert "unproven" not in json.loads((tmp_path / FINAL).read_text())["recipe"]


def test_a_page_in_the_place_of_the_hubs_answers_is_said_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.always["api"] = Fault("status", 200, headers={"Content-Type": "text/html"}, body=PAGE)
    with pytest.raises(NetworkFailed, match="a page for people, not a hub's"):
        fetch(hub, tmp_path)
    assert len(hub.log) == 1


def test_a_mirror_that_passes_on_the_hubs_links_is_asked_for_every_page(tmp_path: Path) -> None:
    many = {f"{i:02}.txt": b"%d" % i for i in range(7)}
    with Hub(page_size=3) as mirror, Hub() as other:
        commit = mirror.add(REPO, many)
        page = f"{other.endpoint}/api/models/{REPO}/tree/{commit}?recursive=true&expand=false&cursor="
        mirror.faults["api"] = [
            None,
            *(Fault("headers", headers={"Link": f'<{page}{at}>; rel="next"'}) for at in (3, 6)),
        ]
        fetch(mirror, tmp_path)
        assert other.log == []
    assert_complete(tmp_path, many)


@pytest.mark.parametrize(
    "link", ["https://huggingface.co{}?cursor=2", "http://m{}?cursor=2", "{}?cursor=2", "?cursor=2", "/hf{}?cursor=2"]
)
def test_a_listing_goes_on_at_the_endpoint(link: str) -> None:
    path = "/api/models/o/n/tree/c"
    found = _next_page(f"https://m/hf{path}?recursive=true", link.format(path), "https://m/hf")
    assert found == f"https://m/hf{path}?cursor=2"


def test_headers_are_read_whatever_their_case(tmp_path: Path) -> None:
    with Hub(page_size=3) as hub:
        commit = hub.add(REPO, {f"{i}.txt": b"x" for i in range(4)})
        link = f'</api/models/{REPO}/tree/{commit}?recursive=true&cursor=3>; rel="next"'
        hub.faults["api"] = [None, Fault("headers", headers={"Link": None, "link": link})]
        assert len(fetch(hub, tmp_path).files) == 4
