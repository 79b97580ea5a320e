"""A Hugging Face cache as a source: what it has is read from there and proven, what it lacks comes from the hub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import systems
import torch
from hub import Fault, Hub
from huggingface_hub import hf_hub_download, snapshot_download
from support import digests, write_checkpoint

import weightops
from weightops.cli.hub_cache import hub_cache
from weightops.cli.main import run
from weightops.engine.control import Control
from weightops.engine.proof import fetched_nbytes
from weightops.errors import CorruptInput, Differs, NetworkFailed, SourceMissing, UsageError, WeightopsError
from weightops.formats.places import find_place
from weightops.stores.cache import CachedRepository, HubCache
from weightops.stores.listed import ListedStore
from weightops.stores.stores import Stores
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

QUICK = Policy(timeout_s=2, attempts=2, first_delay_s=0.01)
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SOURCE = "hf://org/m"


@dataclass
class Cache:
    """A cache of `org/m` that huggingface_hub has filled, and the hub that it is from."""

    hub: Hub
    folder: Path
    files: dict[str, Any]
    commit: str
    webs: ExitStack

    @property
    def repository(self) -> Path:
        return self.folder / "models--org--m"

    def path(self, name: str) -> Path:
        return self.repository / "snapshots" / self.commit / name

    def blob(self, name: str) -> Path:
        return self.path(name).resolve()

    @property
    def web(self) -> Web:
        """Connections of its own, for what has failed once goes on failing."""
        return self.webs.enter_context(Web(QUICK, endpoint=self.hub.endpoint))

    def control(self, *, offline: bool = False) -> Control:
        return Control(stores=Stores(self.web, cache=self.folder, offline=offline))

    def shard(self, out: Path, source: str = SOURCE, *, offline: bool = False, **options: Any) -> Any:
        return weightops.shard(source, out, control=self.control(offline=offline), **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tensors = {f"model.layers.{i}.mlp.weight": torch.randn(200, 100).half() for i in range(12)}
    write_checkpoint(folder, tensors, {"vocab_size": 200}, shards=2)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "README.md").write_bytes(b"# m")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def cache(hub: Hub, model: Path, tmp_path: Path) -> Iterator[Cache]:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    commit = hub.add("org/m", files)
    snapshot_download("org/m", cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    hub.log.clear()
    with ExitStack() as webs:
        yield Cache(hub, tmp_path / "cache", files, commit, webs)


def sent(cache: Cache) -> set[str]:
    """The files of which the hub has sent any byte."""
    return {r.name for r in cache.hub.log if r.name and r.bytes_sent}


def flip(path: Path, at: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- what is read from where ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [False, True])
def test_a_command_gives_the_bytes_that_it_gives_of_a_folder(
    cache: Cache, model: Path, tmp_path: Path, offline: bool
) -> None:
    weightops.shard(model, tmp_path / "local", max_shard_size="100KB")
    result = cache.shard(tmp_path / "out", offline=offline, max_shard_size="100KB")
    found = {name: digests(tmp_path / name) for name in ("local", "out")}
    for files in found.values():
        files.pop("weightops-manifest.json")
    assert found["out"] == found["local"]
    assert result.manifest.sources["source"].name == f"hf://org/m@{cache.commit}"
    said = f"hf://org/m: offline: main is commit {cache.commit} in the cache"
    assert result.warnings == ((said,) if offline else ())
    assert sent(cache) == set()
    assert (cache.hub.log == []) == offline


def test_what_the_cache_lacks_comes_from_the_hub(cache: Cache, tmp_path: Path) -> None:
    cache.blob(SHARDS[1]).unlink()
    cache.path("tokenizer.model").unlink()
    cache.blob("config.json").unlink()
    plan = cache.shard(tmp_path / "out", dry_run=True).plan
    nbytes = len(cache.files[SHARDS[1]])
    assert 0.9 * nbytes < fetched_nbytes(plan) < 1.1 * nbytes
    assert cache.shard(tmp_path / "out").manifest.files["tokenizer.model"].nbytes == 6
    # Its content is in the cache all the same.
    assert sent(cache) == {SHARDS[1], "config.json"}


def test_what_an_earlier_commit_brought_is_not_fetched_again(cache: Cache, tmp_path: Path) -> None:
    later = cache.hub.add("org/m", {**cache.files, "config.json": b'{"vocab_size": 201}'})
    result = cache.shard(tmp_path / "out")
    assert result.manifest.sources["source"].name == f"hf://org/m@{later}"
    assert sent(cache) == {"config.json"}


def test_a_run_from_the_hub_goes_on_from_the_cache(cache: Cache, tmp_path: Path) -> None:
    from_hub = weightops.shard(SOURCE, tmp_path / "out", control=Control(web=cache.web), dry_run=True).plan
    cached = cache.shard(tmp_path / "out", dry_run=True).plan
    assert from_hub.sources[0].is_on_server
    assert not cached.sources[0].is_on_server
    assert from_hub.fingerprint == cached.fingerprint


def test_without_a_cache_none_is_read(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is the command line's alone to read."""
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.folder))
    weightops.shard(SOURCE, tmp_path / "out", control=Control(web=cache.web))
    assert {*SHARDS, "config.json"} <= sent(cache)
    with pytest.raises(NetworkFailed, match="offline none is asked"):
        weightops.inspect(SOURCE, control=Control(stores=Stores(offline=True)))
    opened = weightops.open_checkpoint(SOURCE, cache.control().stores)
    with pytest.raises(UsageError, match="no cache to read from"):
        weightops.save(opened, tmp_path / "saved")


def test_the_command_line_reads_the_cache_of_the_environment(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", cache.hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.folder))
    assert run(["shard", SOURCE, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "network" not in capsys.readouterr().out
    assert run(["shard", SOURCE, "--out", str(tmp_path / "out")]) == 0
    assert sent(cache) == set()
    cache.hub.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in ("inspect", "check", "verify"):
        assert run([command, SOURCE]) == 0
    assert cache.hub.log == []
    assert re.search(rf"^note +file +hf://org/m: offline: main is commit {cache.commit}", capsys.readouterr().out, re.M)
    assert run(["inspect", "hf://org/other"]) == 10
    assert "weightops download --cache org/other" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/a/b"},
        {"HF_HOME": "~/c", "XDG_CACHE_HOME": "/a/b"},
        {"HF_HOME": "/d", "HUGGINGFACE_HUB_CACHE": "$HOME/e"},
        {"HF_HUB_CACHE": "~/f/$USER", "HF_HOME": "/d", "HUGGINGFACE_HUB_CACHE": "/e"},
    ],
    ids=str,
)
def test_the_cache_is_where_huggingface_hub_has_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/x", "USER": "x", **environment}.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(hub_cache()) == done.stdout.strip()


@pytest.mark.parametrize("path", ["org/m", "org/m@main"])
def test_a_name_that_is_no_path_may_be_one_of_a_repository(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceMissing, match="no such file or folder") as caught:
        weightops.inspect(path)
    assert caught.value.hint == f"did you mean hf://{path}?"


@pytest.mark.parametrize("path", ["m", "here/m", "a/b/c", "./org/m", "/org/m", "../m", "org/m.safetensors", "org/m m"])
def test_other_paths_are_not_taken_for_one(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceMissing, match="no such file or folder") as caught:
        find_place(Path(path) if path.startswith("/") else path, Stores())
    assert caught.value.hint is None or path == "./org/m"


# --- proof ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", [SHARDS[1], "config.json", "tokenizer.model"])
def test_a_flipped_byte_is_found_and_nothing_is_published(
    cache: Cache, tmp_path: Path, name: str, offline: bool
) -> None:
    blob = cache.blob(name)
    flip(blob, -1)
    with pytest.raises(Differs, match=rf"{name}: \w+ is [0-9a-f]+, expected {blob.name}") as caught:
        cache.shard(tmp_path / "out", offline=offline)
    assert str(blob) in (caught.value.hint or "")
    assert not list(tmp_path.glob("out*"))
    # What the hint says helps, where the hub can be asked.
    blob.unlink()
    if not offline:
        assert cache.shard(tmp_path / "out").warnings == ()
        assert sent(cache) == {name}


def test_a_flipped_byte_is_found_by_check_too_and_where_bytes_do_not_pass_in_order(
    cache: Cache, tmp_path: Path
) -> None:
    flip(cache.blob(SHARDS[1]), 20_000)
    with pytest.raises(Differs, match=SHARDS[1]):
        weightops.check(SOURCE, control=cache.control(), architecture=False, workers=3)
    with pytest.raises(Differs, match=SHARDS[1]):
        cache.shard(tmp_path / "out", workers=3, max_shard_size="100KB")
    assert not list(tmp_path.glob("out*"))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lead_out(path: Path) -> None:
    shutil.copy(path, path.parents[3] / path.name)
    path.unlink()
    path.symlink_to(path.parents[3] / path.name)


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [shorten, empty, lead_out, lead_nowhere, make_folder]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.model"])
def test_a_copy_that_is_no_good_is_fetched_from_the_hub_by_name(
    cache: Cache, model: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(cache.blob(name))
    result = cache.shard(tmp_path / "out")
    assert sent(cache) == {name}
    assert [f"{name} is read from the hub, not from the cache: " in w for w in result.warnings] == [True]
    assert result.manifest.content_id == weightops.manifest(model).content_id
    assert result.manifest.files["tokenizer.model"].nbytes == 6


@pytest.mark.parametrize("is_noted", [True, False], ids=["noted", "not noted"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_offline_it_is_refused_by_name(
    cache: Cache, tmp_path: Path, name: str, damage: Callable[[Path], None], is_noted: bool
) -> None:
    blob = cache.blob(name)
    if not is_noted:
        shutil.rmtree(cache.repository / "trees")
    damage(blob)
    with pytest.raises((CorruptInput, Differs, SourceMissing), match=f"{name}|{blob.name}"):
        cache.shard(tmp_path / "out", offline=True)
    assert not list(tmp_path.glob("out*"))


def relink(cache: Cache, name: str, target: str | Path) -> None:
    cache.path(name).unlink()
    cache.path(name).symlink_to(target)


@pytest.mark.parametrize("target", ["README.md", "outside", "name"])
def test_a_link_to_another_content_is_never_followed(cache: Cache, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").write_bytes(b"{}")
    (cache.repository / "blobs" / "name").write_bytes(b"{}")
    targets = {"README.md": cache.blob("README.md"), "outside": tmp_path / "outside"}
    relink(cache, "config.json", targets.get(target, cache.repository / "blobs" / target))
    right = cache.files["config.json"]
    cache.shard(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == right
    with pytest.raises(CorruptInput, match=r"config\.json: leads to "):
        cache.shard(tmp_path / "offline", offline=True)
    assert not list(tmp_path.glob("offline*"))


def test_a_copy_in_the_place_of_a_link_is_held_to_what_the_commit_lists(cache: Cache, tmp_path: Path) -> None:
    """As in a cache where there are no links."""
    for name in cache.files:
        blob = cache.blob(name)
        cache.path(name).unlink()
        blob.rename(cache.path(name))
    for offline in (False, True):
        assert cache.shard(tmp_path / f"out-{offline}", offline=offline).manifest.files
    assert sent(cache) == set()
    flip(cache.path(SHARDS[0]))
    for offline in (False, True):
        with pytest.raises(Differs, match=rf"{SHARDS[0]}: sha256 is") as caught:
            cache.shard(tmp_path / "flipped", offline=offline)
        assert str(cache.path(SHARDS[0])) in (caught.value.hint or "")
    shutil.rmtree(cache.repository / "trees")
    with pytest.raises(CorruptInput, match="is no link to a blob, so nothing says what it should hold"):
        cache.shard(tmp_path / "unlisted", offline=True)


def test_blobs_that_repositories_share_are_read_through_their_links(cache: Cache, tmp_path: Path) -> None:
    """huggingface_hub keeps some contents once for the whole cache, with links for blobs."""
    shared = cache.folder / "blobs" / "ab"
    shared.mkdir(parents=True)
    blob = cache.blob(SHARDS[0])
    blob.rename(shared / "content")
    blob.symlink_to(os.path.relpath(shared / "content", blob.parent))
    for offline in (False, True):
        assert cache.shard(tmp_path / f"out-{offline}", offline=offline).manifest.files
    assert sent(cache) == set()


def test_the_folder_of_a_repository_may_lie_on_another_disk(cache: Cache, tmp_path: Path) -> None:
    cache.repository.rename(tmp_path / "disk")
    cache.repository.symlink_to(tmp_path / "disk")
    assert cache.shard(tmp_path / "out", offline=True).manifest.files


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_file_that_changes_while_it_is_read_is_refused(cache: Cache, tmp_path: Path, size: str) -> None:
    control = cache.control()
    with control.stores.connected() as stores:
        opened = weightops.open_checkpoint(SOURCE, stores)
        blob = cache.blob(SHARDS[0])
        data = blob.read_bytes()
        blob.unlink()
        blob.write_bytes(data if size == "same" else data + b"x")
        with pytest.raises(CorruptInput, match=f"{SHARDS[0]}: changed while it was being read"):
            weightops.save(opened, tmp_path / "out", control=control)
    assert not list(tmp_path.glob("out*"))


def test_that_a_file_has_changed_is_said_once(cache: Cache) -> None:
    stores = cache.control(offline=True).stores
    store = find_place(SOURCE, stores)
    assert isinstance(store, ListedStore)
    data = store.get("config.json")
    cache.blob("config.json").unlink()
    cache.repository.joinpath("blobs", Path(os.readlink(cache.path("config.json"))).name).write_bytes(data)
    with pytest.raises(CorruptInput, match="changed while it was being read"):
        store.get("config.json")
    assert store.get("config.json") == data


def test_reading_ends_when_the_command_does(cache: Cache, tmp_path: Path) -> None:
    control = cache.control()
    with control.stores.connected() as stores:
        opened = weightops.open_checkpoint(SOURCE, stores)
        stores.interrupt(WeightopsError("enough"))
        with pytest.raises(WeightopsError, match="enough"):
            weightops.save(opened, tmp_path / "out", control=control)


# --- offline ----------------------------------------------------------------------------------------------------------


def test_revisions_are_those_that_the_cache_knows(cache: Cache) -> None:
    tagged = cache.hub.add("org/m", {**cache.files, "config.json": b"{}"}, revision="refs/pr/1")
    hf_hub_download("org/m", "config.json", revision="refs/pr/1", cache_dir=cache.folder, endpoint=cache.hub.endpoint)
    own = HubCache(cache.folder).repository("org/m")
    assert own.find_commit("main") == own.find_commit(cache.commit) == cache.commit
    assert own.find_commit("refs/pr/1") == tagged
    for revision, why in {"v2": "does not know v2", "0" * 40: f"has nothing of commit {'0' * 40}"}.items():
        with pytest.raises(SourceMissing, match=why) as caught:
            own.find_commit(revision)
        assert "download --cache org/m" in (caught.value.hint or "")
    with pytest.raises(CorruptInput, match="not a plain path"):
        own.find_commit("../../x")


@pytest.mark.parametrize(
    ("ref", "error", "why"),
    [
        ("0" * 40, SourceMissing, "has nothing of commit 0000"),
        ("elsewhere", CorruptInput, "refs/main: names no commit"),
        ("", CorruptInput, "refs/main: names no commit"),
    ],
)
def test_a_ref_that_names_no_commit_of_the_cache_is_refused(
    cache: Cache, ref: str, error: type[WeightopsError], why: str
) -> None:
    (cache.repository / "refs" / "main").write_text(ref)
    with pytest.raises(error, match=why):
        weightops.inspect(SOURCE, control=cache.control(offline=True))
    assert weightops.inspect(SOURCE, control=cache.control()).tensors


def test_the_first_weight_file_that_the_cache_lacks_is_named(cache: Cache) -> None:
    cache.path(SHARDS[1]).unlink()
    with pytest.raises(SourceMissing, match=rf"does not have {SHARDS[1]} of commit {cache.commit}") as caught:
        weightops.inspect(SOURCE, control=cache.control(offline=True))
    assert caught.value.hint == "with a network, `weightops download --cache org/m` fetches it"
    # Without an index it is what the hub listed, and where that was not noted no name is known.
    cache.path(SHARDS[0]).unlink()
    cache.path("model.safetensors.index.json").unlink()
    with pytest.raises(SourceMissing, match=f"does not have {SHARDS[0]}"):
        weightops.inspect(SOURCE, control=cache.control(offline=True))
    shutil.rmtree(cache.repository / "trees")
    with pytest.raises(SourceMissing, match="does not have any weights"):
        weightops.inspect(SOURCE, control=cache.control(offline=True))


@pytest.mark.parametrize(
    "note",
    [
        *(b"", b"{}", b'{"format_version": 2, "files": {}}', b"\xff", b"[1]"),
        b'{"format_version": 1, "files": {"config.json": {"size": 1, "blob_id": "../../../x"}}}',
    ],
)
def test_a_note_of_the_commit_that_makes_no_sense_says_nothing(cache: Cache, note: bytes) -> None:
    own = HubCache(cache.folder).repository("org/m")
    assert own.find_tree(cache.commit).keys() == cache.files.keys()
    own.tree_path(cache.commit).write_bytes(note)
    assert own.find_tree(cache.commit) == {}
    assert weightops.inspect(SOURCE, control=cache.control(offline=True)).tensors


def test_what_goes_along_with_the_weights_and_is_not_there_is_named(cache: Cache, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "config.json"):
        cache.path(name).unlink()
    result = cache.shard(tmp_path / "out", offline=True)
    assert "hf://org/m: not in the cache, so left out: config.json, tokenizer.model" in result.warnings
    assert cache.shard(tmp_path / "online").warnings == ()


def test_a_folder_and_a_file_of_a_repository(cache: Cache, tmp_path: Path) -> None:
    files = {f"sub/{name}": data for name, data in cache.files.items()}
    cache.hub.add("org/m", files)
    snapshot_download("org/m", cache_dir=cache.folder, endpoint=cache.hub.endpoint)
    cache.hub.log.clear()
    for offline in (False, True):
        stores = cache.control(offline=offline).stores
        folder = find_place("https://huggingface.co/org/m/tree/main/sub", stores)
        assert isinstance(folder, ListedStore)
        assert folder.names() == sorted(cache.files)
        assert folder.get("config.json") == cache.files["config.json"]
        found = weightops.open_checkpoint(f"https://huggingface.co/org/m/blob/main/sub/{SHARDS[0]}", stores)
        assert len(found) == 6
    assert sent(cache) == set()
    with pytest.raises(SourceMissing, match=r"does not have sub/other\.bin"):
        find_place("https://huggingface.co/org/m/blob/main/sub/other.bin", cache.control(offline=True).stores)
    with pytest.raises(NetworkFailed, match="is on a server, and offline none is asked"):
        find_place("https://example.org/model.safetensors", cache.control(offline=True).stores)


def test_names_may_hold_what_urls_do_not(cache: Cache, tmp_path: Path) -> None:
    odd = "vocab&.json" if "windows" in systems.installed else "vocab?.json"
    names = {"my model #1, 50%.safetensors": cache.files[SHARDS[0]], odd: b"{}", "Übersicht.jinja": b"x"}
    cache.hub.add("org/m", names)
    snapshot_download("org/m", cache_dir=cache.folder, endpoint=cache.hub.endpoint)
    cache.hub.log.clear()
    from_hub = weightops.shard(SOURCE, tmp_path / "x", control=Control(web=cache.web), dry_run=True).plan
    cache.hub.log.clear()
    for offline in (False, True):
        result = cache.shard(tmp_path / f"out-{offline}", offline=offline)
        assert result.plan.fingerprint == from_hub.fingerprint
        assert {odd, "Übersicht.jinja"} < result.manifest.files.keys()
    assert sent(cache) == set()


def test_names_lead_to_no_other_repository(tmp_path: Path) -> None:
    assert CachedRepository(tmp_path, "org/a--b").folder == tmp_path / "models--org--a--b"


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [False, True])
def test_verify_holds_the_copy_in_the_cache_against_the_digests(cache: Cache, offline: bool) -> None:
    control = cache.control(offline=offline)
    report = weightops.verify(SOURCE, control=control)
    assert report.verdict
    assert report.counts["ok"] == len(cache.files)
    assert report.folder == f"hf://org/m@{cache.commit}"
    flip(cache.blob(SHARDS[0]))
    shorten(cache.blob("README.md"))
    report = weightops.verify(SOURCE, control=control)
    assert not report.verdict
    assert {file.name for file in report.files if file.status == "differs"} == {SHARDS[0], "README.md"}
    assert sent(cache) == set()


def test_verify_says_what_is_not_in_the_cache(cache: Cache, model: Path, tmp_path: Path) -> None:
    cache.path("README.md").unlink()
    cache.path("other").write_bytes(b"x")
    report = weightops.verify(SOURCE, control=cache.control())
    assert report.verdict
    assert report.warnings == ("hf://org/m: not in the cache, so not verified: README.md",)
    assert [file.name for file in report.files if file.status == "extra"] == ["other"]
    shutil.copytree(model, tmp_path / "copy")
    weightops.manifest(tmp_path / "copy").to_bytes()
    (tmp_path / "list.json").write_bytes(weightops.manifest(tmp_path / "copy").to_bytes())
    held = weightops.verify(SOURCE, tmp_path / "list.json", control=cache.control(), content=True)
    assert held.content_equal
    cache.path("config.json").unlink()
    cache.path("config.json").symlink_to(cache.blob(SHARDS[0]))
    assert not weightops.verify(SOURCE, control=cache.control()).verdict
    shutil.rmtree(cache.repository)
    with pytest.raises(SourceMissing, match=r"nothing of commit .* is in the cache"):
        weightops.verify(SOURCE, control=cache.control())
    with pytest.raises(UsageError, match="no cache that could have a copy"):
        weightops.verify(SOURCE, control=Control(web=cache.web))
    with pytest.raises(UsageError, match="expected a folder on this machine or hf://"):
        weightops.verify(f"{cache.hub.endpoint}/x/", control=cache.control())


def test_a_fault_of_the_disk_is_said(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_at(*_: object) -> int:
        raise OSError(5, os.strerror(5))

    opened = weightops.open_checkpoint(SOURCE, cache.control().stores)
    monkeypatch.setattr("weightops.stores.local.read_at", read_at)
    with pytest.raises(WeightopsError, match=r"cannot be read at byte 0 \(Input/output error\)"):
        weightops.save(opened, tmp_path / "out", control=cache.control())


def test_a_hub_that_fails_is_not_replaced_by_the_cache(cache: Cache) -> None:
    """What main is now nobody knows: the commit that it was is only taken when that is asked for."""
    cache.hub.always["api"] = Fault("status", 503)
    with pytest.raises(NetworkFailed, match="gave up"):
        weightops.inspect(SOURCE, control=cache.control())
