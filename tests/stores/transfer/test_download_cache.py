"""`weightops download --cache` makes what huggingface_hub would have made, proven, and loses nothing that was there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fetching import MIB, QUICK, content, wait_until
from filelock import FileLock
from hub import Fault, Hub, status
from huggingface_hub import get_cached_repo_tree, hf_hub_download, scan_cache_dir, snapshot_download
from killing import forked
from tiny_models import save_tiny

from weightops import api
from weightops.cli.main import run
from weightops.engine.control import Control, Silent
from weightops.errors import CorruptInput, Differs, NetworkFailed, UsageError, WeightopsError
from weightops.operations.download import Download
from weightops.stores.transfer.partial import STATE
from weightops.stores.web.web import Web

REPO = "org/model"
WEIGHTS = "model.safetensors"
FILES: dict[str, bytes] = {
    "config.json": b"{}",
    WEIGHTS: content(9 * MIB + 3),
    "sub/tokenizer.json": b"[1]",
    "sub/deeper/same.json": b"{}",
    "empty.txt": b"",
    ".gitattributes": b"*.bin",
    "weightops-manifest.json": b"{}",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, FILES)
        yield hub


def fill(hub: Hub, cache: Path, source: str = REPO, **options: Any) -> Download:
    with Web(QUICK, endpoint=hub.endpoint, token=hub.token) as web:
        return api.download(source, cache=cache, control=Control(web=web), **options)


def layout(cache: Path) -> dict[str, Any]:
    """What lies in a repository's folder: contents of files, where links lead."""
    root = cache / "models--org--model"
    return {
        path.relative_to(root).as_posix(): ("->", os.readlink(path)) if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def folder(cache: Path) -> Path:
    return cache / "models--org--model"


def assert_sound(cache: Path) -> None:
    """Every content is what its name says, every link leads to one, and huggingface_hub finds nothing amiss."""
    for blob in (folder(cache) / "blobs").iterdir():
        data = blob.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        assert blob.name in (hashlib.sha256(data).hexdigest(), git)
    for path in (folder(cache) / "snapshots").rglob("*"):
        assert path.is_dir() or (path.is_symlink() and path.is_file())
    assert scan_cache_dir(cache).warnings == []


# --- what huggingface_hub and transformers make of it -----------------------------------------------------------------


def test_it_is_what_huggingface_hub_makes(hub: Hub, tmp_path: Path) -> None:
    snapshot_download(REPO, cache_dir=tmp_path / "theirs", endpoint=hub.endpoint)
    found = fill(hub, tmp_path / "ours")
    assert layout(tmp_path / "ours") == layout(tmp_path / "theirs")
    modes = [(tmp_path / who / "models--org--model/blobs").iterdir() for who in ("ours", "theirs")]
    assert {path.stat().st_mode for path in modes[0]} == {path.stat().st_mode for path in modes[1]}
    assert found.is_complete
    snapshot = snapshot_download(REPO, cache_dir=tmp_path / "ours", local_files_only=True)
    assert Path(snapshot) == found.out
    assert len(get_cached_repo_tree(REPO, cache_dir=tmp_path / "ours")) == len(FILES)
    assert_sound(tmp_path / "ours")
    # And the other way round: it fetches nothing that is there.
    hub.log.clear()
    snapshot_download(REPO, cache_dir=tmp_path / "ours", endpoint=hub.endpoint)
    assert hub.bytes_sent() == 0


@pytest.mark.slow
def test_transformers_loads_from_it(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    save_tiny(tmp_path / "tiny", "llama")
    with Hub() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()})
        fill(hub, tmp_path / "cache")
    where: Any = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert AutoConfig.from_pretrained(REPO, **where).hidden_size == 64
    assert AutoTokenizer.from_pretrained(REPO, **where)("Streaming")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(REPO, **where).num_parameters()


def test_some_files_of_a_revision(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(REPO, {**FILES, "config.json": b"[]"}, revision="refs/pr/1")
    found = fill(hub, tmp_path, f"{REPO}@refs/pr/1", include="*.json", exclude="sub/deeper/")
    assert [file.name for file in found.files] == ["config.json", "sub/tokenizer.json", "weightops-manifest.json"]
    assert (folder(tmp_path) / "refs/refs/pr/1").read_text() == commit
    assert not (folder(tmp_path) / "refs/main").exists()
    path = hf_hub_download(REPO, "config.json", revision="refs/pr/1", cache_dir=tmp_path, local_files_only=True)
    assert Path(path).read_bytes() == b"[]"
    assert_sound(tmp_path)


@pytest.mark.parametrize("what", ["tree/main/sub", "blob/main/sub/tokenizer.json", ""])
def test_a_page_of_a_repository(hub: Hub, tmp_path: Path, what: str) -> None:
    found = fill(hub, tmp_path, f"https://huggingface.co/{REPO}/{what}")
    names = [name for name in FILES if name.startswith(what.partition("/main/")[2])]
    assert {file.name for file in found.files} == set(names)
    assert_sound(tmp_path)


def test_a_commit_needs_no_ref(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(REPO, FILES)
    fill(hub, tmp_path, revision=commit)
    assert not (folder(tmp_path) / "refs").exists()
    assert snapshot_download(REPO, revision=commit, cache_dir=tmp_path, local_files_only=True)


# --- what is there already --------------------------------------------------------------------------------------------


def test_what_is_there_and_right_is_kept(hub: Hub, tmp_path: Path) -> None:
    hf_hub_download(REPO, WEIGHTS, cache_dir=tmp_path, endpoint=hub.endpoint)
    before = {path: path.lstat().st_ino for path in folder(tmp_path).rglob("*") if not path.is_dir()}
    hub.log.clear()
    found = fill(hub, tmp_path)
    assert found.have == {WEIGHTS: len(FILES[WEIGHTS])}
    assert hub.bytes_sent(WEIGHTS) == 0
    assert {path: path.lstat().st_ino for path in before} == before
    hub.log.clear()
    again = fill(hub, tmp_path)
    assert again.have.keys() == FILES.keys()
    assert hub.bytes_sent() == 0
    assert_sound(tmp_path)


def test_a_ref_moves_with_the_revision_and_what_it_was_stays(hub: Hub, tmp_path: Path) -> None:
    first = fill(hub, tmp_path)
    hub.add(REPO, {**FILES, "config.json": b"[]"})
    hub.log.clear()
    second = fill(hub, tmp_path)
    assert (folder(tmp_path) / "refs/main").read_text() == second.listing.commit
    assert (first.out / "config.json").read_bytes() == b"{}"
    assert (second.out / "config.json").read_bytes() == b"[]"
    assert hub.bytes_sent() == 2, "the rest was there under other names"
    assert_sound(tmp_path)


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lead_out(path: Path) -> None:
    shutil.move(path, path.parents[3] / "outside")
    path.symlink_to(path.parents[3] / "outside")


@pytest.mark.parametrize("damage", [flip, shorten, lead_out])
def test_a_blob_that_is_wrong_is_refused_by_name(hub: Hub, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = tmp_path / "cache"
    blob = Path(hf_hub_download(REPO, WEIGHTS, cache_dir=cache, endpoint=hub.endpoint)).resolve()
    damage(blob)
    before = layout(cache)
    hub.log.clear()
    with pytest.raises((CorruptInput, Differs), match=blob.name) as caught:
        fill(hub, cache)
    assert "remove" in (caught.value.hint or "")
    assert layout(cache) == before
    assert hub.bytes_sent() == 0
    blob.unlink()
    assert fill(hub, cache).is_complete
    assert_sound(cache)


@pytest.mark.parametrize("kind", ["link", "copy", "folder"])
def test_another_file_under_a_name_is_refused_by_name(hub: Hub, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "models--org--model/snapshots" / hub.add(REPO, FILES) / "sub/tokenizer.json"
    path.parent.mkdir(parents=True)
    (tmp_path / "other").write_bytes(b"[2]")
    if kind == "link":
        path.symlink_to(tmp_path / "other")
    elif kind == "copy":
        path.write_bytes(b"[2]")
    else:
        path.mkdir()
    before = layout(tmp_path)
    hub.log.clear()
    with pytest.raises((CorruptInput, Differs), match=r"sub/tokenizer\.json"):
        fill(hub, tmp_path)
    assert layout(tmp_path) == before
    assert hub.bytes_sent() == 0


@pytest.mark.parametrize("name", ["blobs", "snapshots", "refs", "trees", STATE])
def test_no_link_is_written_through(hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    folder(tmp_path).mkdir()
    (folder(tmp_path) / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptInput, match=f"{name} is a link"):
        fill(hub, tmp_path)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_copy_that_is_right_stays_one(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "models--org--model/snapshots" / hub.add(REPO, FILES) / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(FILES[WEIGHTS])
    found = fill(hub, tmp_path)
    assert found.have == {WEIGHTS: len(FILES[WEIGHTS])}
    assert not path.is_symlink()
    assert hub.bytes_sent(WEIGHTS) == 0
    assert scan_cache_dir(tmp_path).warnings == []


def test_where_there_are_no_links_there_are_copies(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def symlink(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", symlink)
    found = fill(hub, tmp_path)
    assert {name: (found.out / name).read_bytes() for name in FILES} == FILES
    assert not any(path.is_symlink() for path in folder(tmp_path).rglob("*"))
    assert snapshot_download(REPO, cache_dir=tmp_path, local_files_only=True)
    assert scan_cache_dir(tmp_path).warnings == []
    assert not (folder(tmp_path) / STATE).exists()
    assert fill(hub, tmp_path).have.keys() == FILES.keys()


# --- on the way -------------------------------------------------------------------------------------------------------


def test_what_breaks_off_is_continued(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault("cut", 6 * MIB), *[status(503)] * 20]
    with pytest.raises(NetworkFailed, match="gave up"):
        fill(hub, tmp_path, workers=1)
    assert (folder(tmp_path) / STATE).is_dir()
    assert not (folder(tmp_path) / "refs").exists(), "no revision is said to be there before it is"
    assert_sound(tmp_path)
    assert not any(path.name.endswith(".incomplete") for path in (folder(tmp_path) / "blobs").iterdir())
    hub.faults.clear()
    hub.log.clear()
    found = fill(hub, tmp_path)
    assert found.is_complete
    assert hub.bytes_sent() <= len(FILES[WEIGHTS]) - 4 * MIB
    assert not (folder(tmp_path) / STATE).exists()
    assert_sound(tmp_path)


def test_a_flipped_byte_gets_no_name(hub: Hub, tmp_path: Path) -> None:
    hub.always[WEIGHTS] = Fault("flip", 5)
    with pytest.raises(Differs, match=rf"{WEIGHTS}: sha256 is [0-9a-f]+, expected [0-9a-f]+, twice over"):
        fill(hub, tmp_path)
    assert_sound(tmp_path)
    assert not (folder(tmp_path) / "refs").exists()


class Noted(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_file_that_huggingface_hub_is_fetching_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    digest = hashlib.sha256(FILES[WEIGHTS]).hexdigest()
    lock = FileLock(tmp_path / f".locks/models--org--model/{digest}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True)
    blob = folder(tmp_path) / "blobs" / digest
    progress, done = Noted(), []
    with Web(QUICK, endpoint=hub.endpoint) as web:

        def download() -> None:
            done.append(api.download(REPO, cache=tmp_path, control=Control(progress, web=web)))

        with lock:
            thread = threading.Thread(target=download)
            thread.start()
            wait_until(lambda: len(list(blob.parent.glob("*"))) == 4)
            wait_until(lambda: bool(progress.notes))
            assert not blob.exists()
            blob.write_bytes(FILES[WEIGHTS])
        thread.join(20)
    assert done[0].is_complete
    assert progress.notes == [f"{WEIGHTS} is being fetched by another run: waiting for it"]
    assert hub.bytes_sent(WEIGHTS) == 0
    assert_sound(tmp_path)


def test_huggingface_hub_waits_for_a_file_that_is_being_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.rate = 6 * MIB
    with Web(endpoint=hub.endpoint) as web:
        ours = threading.Thread(target=lambda: api.download(REPO, cache=tmp_path, control=Control(web=web)))
        ours.start()
        wait_until(lambda: hub.bytes_sent(WEIGHTS) > MIB)
        hf_hub_download(REPO, WEIGHTS, cache_dir=tmp_path, endpoint=hub.endpoint)
        ours.join(20)
    assert hub.bytes_sent(WEIGHTS) < 1.2 * len(FILES[WEIGHTS])
    assert_sound(tmp_path)


def test_of_two_at_once_one_fetches_each_file(hub: Hub, tmp_path: Path) -> None:
    results: list[Download] = []
    threads = [threading.Thread(target=lambda: results.append(fill(hub, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [found.is_complete for found in results] == [True, True]
    assert hub.bytes_sent(WEIGHTS) < 1.5 * len(FILES[WEIGHTS])
    assert_sound(tmp_path)
    assert not (folder(tmp_path) / STATE).exists()


@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_change_to_the_disk_the_cache_is_sound_and_the_same_command_continues(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    files = {**FILES, WEIGHTS: content(5 * MIB)}
    hub.add(REPO, files)
    command, kills, first = ["download", "--cache", REPO], 0, random.Random(step).randrange(step) + 1
    for fatal in range(first, 1000, step):
        cache = tmp_path / str(fatal)
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        if forked(command, fatal) == 0:
            break
        kills += 1
        if (folder(cache) / "blobs").is_dir():
            assert_sound(cache)
        if (folder(cache) / "refs/main").exists():
            assert snapshot_download(REPO, cache_dir=cache, local_files_only=True)
        assert forked(command, None) == 0, fatal
        assert_sound(cache)
        assert {path.name for path in folder(cache).iterdir()} == {"blobs", "refs", "snapshots", "trees"}, fatal
        assert len(list((folder(cache) / "blobs").iterdir())) == len(files) - 2
        shutil.rmtree(cache)
    assert kills > 5


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(["download", "--cache", *words])


def test_a_dry_run_fetches_and_makes_nothing(
    hub: Hub, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(REPO, "--dry-run") == 0
    assert f"fetch    {9.4} MB of 9.4 MB" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    assert hub.bytes_sent() == 0
    assert command(REPO, "--include", WEIGHTS, "-q") == 0
    assert command(REPO, "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(rf"^{WEIGHTS} +9\.4 MB +here$", out, re.MULTILINE)
    assert "fetch    14 B of 9.4 MB" in out


def test_the_document_says_where_the_files_are(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(REPO, "--json", "-q") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["complete"]
    assert (Path(document["out"]) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert Path(document["out"]).is_relative_to(tmp_path / "cache")
    assert {file["name"] for file in document["files"]} == FILES.keys()


@pytest.mark.parametrize(
    "option",
    ["--out x", "--prune", "--overwrite", "--offline", f"--sha256 {'0' * 64}", f"--md5 {'0' * 32}", "--checksums x"],
)
def test_options_of_folders_are_refused(
    hub: Hub, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert command(REPO, *option.split()) == 2
    assert f"{option.split()[0]} has no use with --cache" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert hub.log == []


def test_a_place_to_write_to_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["download", REPO]) == 2
    assert "give --out DIR, or --cache" in capsys.readouterr().err


def test_nothing_is_asked_offline(
    hub: Hub, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert command(REPO) == 1
    assert "HF_HUB_OFFLINE is set, and this needs the network" in capsys.readouterr().err
    assert hub.log == []


def test_from_python_too(hub: Hub, tmp_path: Path) -> None:
    for given in ({"out": "x"}, {"prune": True}, {"overwrite": True}, {"offline": True}, {"checksums": "x"}):
        with pytest.raises(UsageError, match=f"{next(iter(given))} has no use with a cache"):
            fill(hub, tmp_path, **given)
    with pytest.raises(UsageError, match="no folder to write"):
        api.download(REPO)
    with pytest.raises(UsageError, match="holds repositories of a hub"):
        fill(hub, tmp_path, f"{hub.endpoint}/static/files/model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../canary", "a/../../canary", "/etc/canary", "a\x1bb"])
def test_hostile_listings_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add(REPO, {**FILES, name: b"x"})
    with pytest.raises(CorruptInput, match="not a plain path"):
        fill(hub, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_said_before(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.operations.download.operation.free_disk", lambda out: 1000)
    with pytest.raises(WeightopsError, match=r"more bytes are needed, 1000 are free"):
        fill(hub, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
