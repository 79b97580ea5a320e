"""`weightops download`, as it promises to behave: what it asks for, keeps, replaces, records and says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fetching import (
    FINAL,
    MIB,
    REPO,
    WEIGHTS,
    assert_complete,
    content,
    fetch,
    files,
    sha256,
)
from hub import Fault, Hub
from support import write_checkpoint

import weightops
from weightops.cli.main import run
from weightops.errors import (
    CorruptInput,
    Differs,
    NetworkFailed,
    OutputExists,
    SourceMissing,
    UsageError,
    WeightopsError,
)

DATA, OTHER = content(6 * MIB), content(6 * MIB, seed=1)
MODEL = {"config.json": b"{}", WEIGHTS: DATA}
NEWER = {"config.json": b"[]", WEIGHTS: OTHER}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as hub:
        hub.add(REPO, MODEL)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def command(hub: Hub, out: Path, *options: str, source: str = REPO) -> int:
    return run(["download", source, "--out", str(out), *options])


def test_a_second_run_asks_once_and_none_if_the_commit_is_named(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(REPO, MODEL)
    fetch(hub, tmp_path)
    for source, requests in ((REPO, 1), (f"{REPO}@main", 1), (f"{REPO}@{commit}", 0)):
        hub.log.clear()
        found = fetch(hub, tmp_path, source)
        assert len(hub.log) == requests
        assert set(found.have) == set(MODEL)


def test_a_version_that_differs_only_in_what_was_not_chosen_is_recorded(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path, include=(WEIGHTS,))
    commit = hub.add(REPO, {**MODEL, "config.json": b"[]"})
    fetch(hub, tmp_path, include=(WEIGHTS,))
    assert json.loads((tmp_path / FINAL).read_text())["recipe"]["commit"] == commit
    hub.log.clear()
    fetch(hub, tmp_path, include=(WEIGHTS,))
    assert len(hub.log) == 1
    assert hub.bytes_sent() == 0


def test_small_files_come_first(hub: Hub, tmp_path: Path) -> None:
    """A repository that is bad in its configuration is known for that before gigabytes are fetched."""
    sizes = {"a.bin": 3 * MIB, "b/tokenizer.json": 5, "c.bin": MIB, "d.json": 0, "e.txt": 2000}
    hub.add(REPO, {name: content(nbytes) for name, nbytes in sizes.items()})
    fetch(hub, tmp_path, workers=1)
    assert [r.name for r in hub.log if r.name] == ["b/tokenizer.json", "e.txt", "c.bin", "a.bin"]
    assert_complete(tmp_path, {name: content(nbytes) for name, nbytes in sizes.items()})


def test_listings_of_several_pages_are_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    hub.page_size = 2
    many = {f"folder-{i % 2}/{i}": b"%d" % i for i in range(7)}
    hub.add(REPO, many)
    fetch(hub, tmp_path)
    assert_complete(tmp_path, many)


def test_a_listing_without_end_is_given_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.page_size = 2
    hub.add(REPO, {f"{i}.json": b"{}" for i in range(7)})
    monkeypatch.setattr("weightops.stores.web.hub._MAX_FILES", 7)
    assert len(fetch(hub, tmp_path / "whole").files) == 7
    monkeypatch.setattr("weightops.stores.web.hub._MAX_FILES", 3)
    with pytest.raises(UsageError, match="org/model: more than 3 files"):
        fetch(hub, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_after_all_is_told(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    hub.add(REPO, MODEL)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WeightopsError, match=r"out: .*Permission denied"):
        fetch(hub, tmp_path / "out")


def test_files_may_come_from_another_path_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.relay = True
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)


def test_include_and_exclude_choose_files(hub: Hub, tmp_path: Path) -> None:
    names = ("config.json", "sub/config.json", "sub/deep/a.txt", "a.txt")
    hub.add(REPO, {name: name.encode() for name in names})
    cases: list[tuple[dict[str, tuple[str, ...]], set[str]]] = [
        ({"include": ("*.json",)}, {"config.json", "sub/config.json"}),
        ({"include": ("sub/",)}, {"sub/config.json", "sub/deep/a.txt"}),
        ({"exclude": ("*.txt",)}, {"config.json", "sub/config.json"}),
        ({"include": ("sub/", "a.txt"), "exclude": ("sub/deep/",)}, {"sub/config.json", "a.txt"}),
    ]
    for i, (options, expected) in enumerate(cases):
        fetch(hub, tmp_path / str(i), **options)
        assert files(tmp_path / str(i)).keys() == expected
    with pytest.raises(SourceMissing, match="no file matches") as caught:
        fetch(hub, tmp_path / "none", include=("*.gguf",))
    assert caught.value.exit_code == 10


def test_files_that_were_not_chosen_this_time_are_not_stale(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    assert fetch(hub, tmp_path, include=("*.json",), prune=True).stale == ()
    assert_complete(tmp_path, MODEL)


def test_another_choice_of_files_keeps_what_is_there(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path, include=("*.json",))
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)
    assert hub.bytes_sent("config.json") == len(MODEL["config.json"])


def test_a_dry_run_shows_everything_and_fetches_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(hub, tmp_path / "out", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "config.json" in shown
    assert "fetch    6.3 MB of 6.3 MB" in shown
    assert hub.bytes_sent() == 0
    assert not (tmp_path / "out").exists()


def test_offline_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(NetworkFailed, match="no complete download"):
        fetch(hub, out, offline=True)
    fetch(hub, out)
    hub.log.clear()
    assert set(fetch(hub, out, offline=True).have) == set(MODEL)
    with pytest.raises(NetworkFailed, match=r"not .* at v2"):
        fetch(hub, out, f"{REPO}@v2", offline=True)
    with pytest.raises(NetworkFailed, match=r"not .*org/other"):
        fetch(hub, out, "org/other", offline=True)
    assert fetch(hub, out, offline=True, include=["*.json"]).manifest is not None
    (out / WEIGHTS).unlink()
    with pytest.raises(NetworkFailed, match="missing or cut"):
        fetch(hub, out, offline=True)
    assert command(hub, out, "--offline") == 1
    assert hub.log == []


def test_offline_is_complete_only_for_the_files_that_were_chosen(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fetch(hub, out, include=["*.json"])
    hub.log.clear()
    assert fetch(hub, out, offline=True, include=["*.json"]).manifest is not None
    for other in ({}, {"include": ["*"]}, {"exclude": ["*.json"]}):
        with pytest.raises(NetworkFailed, match="holds what other --include and --exclude chose"):
            fetch(hub, out, offline=True, **other)
    assert hub.log == []


def test_a_file_that_was_cut_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    status = (tmp_path / WEIGHTS).stat()
    os.truncate(tmp_path / WEIGHTS, len(DATA) // 2)
    os.utime(tmp_path / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)


def test_bits_that_rot_on_disk_are_found_by_verify(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    assert run(["verify", str(tmp_path)]) == 0
    status = (tmp_path / WEIGHTS).stat()
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write(bytes([DATA[0] ^ 1]))
    os.utime(tmp_path / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(["verify", str(tmp_path)]) == 3


def test_files_that_are_right_already_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(DATA)
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)
    assert hub.bytes_sent(WEIGHTS) == 0


def test_a_file_of_the_same_name_stays_until_the_right_one_is_there(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(OTHER)
    hub.always[WEIGHTS] = Fault("flip", 5 * MIB)
    with pytest.raises(Differs, match=r"sha256 is .*, expected"):
        fetch(hub, tmp_path, overwrite=True)
    assert files(tmp_path)[WEIGHTS] == OTHER


def test_an_update_that_fails_leaves_the_old_files_and_one_that_succeeds_replaces_them(
    hub: Hub, tmp_path: Path
) -> None:
    fetch(hub, tmp_path)
    hub.add(REPO, NEWER)
    hub.always[WEIGHTS] = Fault("status", 500)
    with pytest.raises(NetworkFailed, match="status 500"):
        fetch(hub, tmp_path)
    assert files(tmp_path)[WEIGHTS] == DATA
    hub.always.clear()
    fetch(hub, tmp_path)
    assert_complete(tmp_path, NEWER)


def test_going_back_after_half_an_update_brings_every_old_file_back(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(REPO, MODEL)
    fetch(hub, tmp_path)
    hub.add(REPO, NEWER)
    hub.always[WEIGHTS] = Fault("status", 500)
    with pytest.raises(NetworkFailed, match="status 500"):
        fetch(hub, tmp_path)
    assert files(tmp_path)["config.json"] == NEWER["config.json"]
    hub.always.clear()
    fetch(hub, tmp_path, f"{REPO}@{commit}")
    assert_complete(tmp_path, MODEL)


def test_files_that_a_new_version_no_longer_has_are_named_and_pruned_on_request(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    (tmp_path / "mine.txt").write_text("not from the hub")
    hub.add(REPO, {"config.json": b"{}"})
    found = fetch(hub, tmp_path)
    assert found.stale == (WEIGHTS,)
    assert any(WEIGHTS in warning and "--prune" in warning for warning in found.warnings)
    assert (tmp_path / WEIGHTS).exists()
    hub.add(REPO, MODEL)
    fetch(hub, tmp_path)
    hub.add(REPO, {"config.json": b"{}"})
    assert fetch(hub, tmp_path, prune=True).stale == ()
    assert files(tmp_path).keys() == {"config.json", "mine.txt"}


def test_stale_files_can_be_pruned_after_they_were_named(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    hub.add(REPO, {"config.json": b"{}"})
    fetch(hub, tmp_path)
    fetch(hub, tmp_path, prune=True)
    assert_complete(tmp_path, {"config.json": b"{}"})


def test_a_url_is_fetched_and_not_again(hub: Hub, tmp_path: Path) -> None:
    hub.static[WEIGHTS] = DATA
    url = f"{hub.endpoint}/static/files/{WEIGHTS}?signature=secret"
    fetch(hub, tmp_path, url)
    assert_complete(tmp_path, {WEIGHTS: DATA})
    assert "secret" not in (tmp_path / FINAL).read_text()
    sent = hub.bytes_sent()
    fetch(hub, tmp_path, url)
    assert hub.bytes_sent() == sent + 1  # its size and ETag, with its first byte


def test_an_empty_file_at_a_url(hub: Hub, tmp_path: Path) -> None:
    hub.static["empty.txt"] = b""
    fetch(hub, tmp_path, f"{hub.endpoint}/static/files/empty.txt")
    assert_complete(tmp_path, {"empty.txt": b""})


@pytest.mark.parametrize("option", ["--sha256", "--md5"])
def test_a_digest_on_the_command_line_is_held_against_the_file(hub: Hub, tmp_path: Path, option: str) -> None:
    hub.static[WEIGHTS] = DATA
    url = f"{hub.endpoint}/static/files/{WEIGHTS}"
    right = hashlib.new(option[2:], DATA).hexdigest()
    wrong = hashlib.new(option[2:], OTHER).hexdigest()
    assert command(hub, tmp_path / "wrong", option, wrong, source=url) == 3
    assert files(tmp_path / "wrong") == {}
    assert command(hub, tmp_path / "right", option, right.upper(), source=url) == 0
    assert_complete(tmp_path / "right", {WEIGHTS: DATA})
    assert command(hub, tmp_path / "right", option, wrong, source=url) == 3
    assert command(hub, tmp_path / "none", option, right[1:], source=url) == 2
    assert command(hub, tmp_path / "none", option, right) == 2


def test_a_checksum_list_beside_a_file_is_held_against_it(hub: Hub, tmp_path: Path) -> None:
    hub.static |= {WEIGHTS: DATA, "SHA256SUMS": f"{sha256(DATA)}  {WEIGHTS}\n".encode()}
    hub.static |= {
        "wrong/SHA256SUMS": f"{sha256(OTHER)}  {WEIGHTS}\n".encode(),
        "other/SHA256SUMS": b"0" * 64 + b"  x\n",
    }
    url = f"{hub.endpoint}/static/files/"
    assert fetch(hub, tmp_path / "right", url + WEIGHTS, checksums=f"{url}SHA256SUMS").manifest
    with pytest.raises(Differs, match=sha256(OTHER)):
        fetch(hub, tmp_path / "wrong", url + WEIGHTS, checksums=f"{url}wrong/SHA256SUMS")
    with pytest.raises(SourceMissing, match="does not list"):
        fetch(hub, tmp_path / "none", url + WEIGHTS, checksums=f"{url}other/SHA256SUMS")


@pytest.mark.parametrize("there", ["a file", "a manifest of another command"])
def test_what_something_else_made_is_left_alone(hub: Hub, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / FINAL).write_text('{"schema": "weightops-manifest/1", "files": {}}')
    with pytest.raises(OutputExists, match=r"exists and is not a folder|that was not downloaded") as caught:
        fetch(hub, out)
    assert caught.value.exit_code == 11
    assert hub.bytes_sent() == 0


def test_a_list_of_urls_with_digests(hub: Hub, tmp_path: Path) -> None:
    hub.static |= {"a.bin": DATA, "b.bin": OTHER, "c.txt": b"c"}
    md5 = hashlib.md5(OTHER).hexdigest()
    listed = tmp_path / "list.txt"
    lines = [
        "# three files\n",
        f"{sha256(DATA)}  {hub.endpoint}/static/files/a.bin",
        f"md5:{md5}  {hub.endpoint}/static/files/b.bin",
        f"{hashlib.sha1(b'c').hexdigest()}  {hub.endpoint}/static/files/c.txt",
    ]
    listed.write_text("\n".join(lines))
    fetch(hub, tmp_path / "out", str(listed))
    assert_complete(tmp_path / "out", {"a.bin": DATA, "b.bin": OTHER, "c.txt": b"c"})
    listed.write_text("\n".join(lines).replace(md5, "0" * 32))
    with pytest.raises(Differs, match=rf"b\.bin: md5 is {md5}, expected {'0' * 32}"):
        fetch(hub, tmp_path / "wrong", str(listed))
    assert "b.bin" not in files(tmp_path / "wrong")
    listed.write_text(f"{sha256(DATA)} a.bin")
    with pytest.raises(CorruptInput, match="line 1"):
        fetch(hub, tmp_path / "none", str(listed))


def test_a_source_s_own_manifest_tells_of_tensors_if_its_files_are_those_that_came(hub: Hub, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"a": torch.ones(3)})
    (model / FINAL).write_bytes(weightops.manifest(model, digest="sha256").to_bytes())
    there = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.add(REPO, there)
    assert fetch(hub, tmp_path / "right").manifest.tensors.keys() == {"a"}
    for name, changed in (
        ("other", {WEIGHTS: there[WEIGHTS][:-1] + b"\1"}),
        ("no", {FINAL: b"{}"}),
        ("elsewhere", {"renamed.safetensors": there[WEIGHTS], WEIGHTS: None}),
        ("none", {FINAL: None}),
    ):
        hub.add(REPO, {n: data for n, data in {**there, **changed}.items() if data is not None})
        found = fetch(hub, tmp_path / name).manifest
        assert found.tensors == {}, name
        assert found.content_id is None
