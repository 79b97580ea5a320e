"""File names and folders that would have `weightops download` write elsewhere: refused, nothing is written outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from fetching import FINAL, MIB, REPO, WEIGHTS, assert_complete, content, fetch
from hub import Hub
from systems import mkfifo

from weightops import api
from weightops.errors import CorruptInput, WeightopsError
from weightops.io.platform.names import folds_case, why_refused
from weightops.stores.transfer.partial import STATE

DATA = content(5 * MIB)
MODEL = {"config.json": b"{}", WEIGHTS: DATA}
NASTY = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, MODEL)
        yield hub


def assert_one_clean_sentence(error: BaseException) -> None:
    assert str(error).isprintable()
    assert "unexpected" not in str(error)


NAMES = {
    "parent folder": "../x",
    "parent folder below": "a/../../x",
    "absolute": "/tmp/weightops-canary",
    "drive": "C:\\x",
    "drive with slashes": "C:/x",
    "backslashes": "a\\..\\x",
    "folder": "a/",
    "dot": "./c",
    "double slash": "a//c",
    "empty": "",
    "300 characters": "x" * 300,
    "NUL": "a\0b",
    "newline": "a\nb",
    "terminal escape": "\x1b[2Jb",
    "bidirectional override": "a\u202eb",
    "invisible": "a\u2060b",
    "no character": "a\uffffb",
    "not seen in a later Unicode": "a\U000e0fffb",
}


@pytest.mark.parametrize("attack", NAMES)
def test_names_that_lead_elsewhere_refuse_the_whole_repository(hub: Hub, tmp_path: Path, attack: str) -> None:
    hub.add(REPO, {**MODEL, NAMES[attack]: b"owned"}, lfs=())
    with pytest.raises(CorruptInput, match="is not a plain path") as caught:
        fetch(hub, tmp_path / "out", exclude=("y", "config.json"))
    assert caught.value.exit_code == 13
    assert_one_clean_sentence(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert hub.bytes_sent() == 0
    hub.add(REPO, {**MODEL, "c.json": b"[]", NAMES[attack]: b"owned"}, lfs=())
    fetch(hub, tmp_path / "some", include=("c*.json",))
    assert_complete(tmp_path / "some", {"config.json": b"{}", "c.json": b"[]"})


ORDINARY = [
    *(".lock", ".plan.json", ".journal.jsonl", "poetry.lock", "a.partial", ".cache/other", "cache/huggingface/x"),
    *("img/\U0001f469\u200d\U0001f4bb.png", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645.txt", "\U0001fae9.png"),
    *("\U0001f3f3\ufe0f\u200d\U0001f308.txt", "\u0b95\u0bcd\u200c\u0bb7", "a b", "ab:c", "~", "#1", "50%25", "e\u0301"),
]


@pytest.mark.parametrize("name", ORDINARY, ids=ascii)
def test_ordinary_names_are_taken_and_verified(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add(REPO, {**MODEL, name: b"x"}, lfs=())
    if why_refused(name) is not None:
        with pytest.raises(CorruptInput, match="cannot be used on this system: Windows has no : in names"):
            fetch(hub, tmp_path)
        return
    fetch(hub, tmp_path)
    assert_complete(tmp_path, {**MODEL, name: b"x"})
    assert api.verify(tmp_path).verdict


DROPPINGS = [
    *(".cache/huggingface/download/config.json.metadata", ".cache/huggingface/.gitignore", ".cache/huggingface"),
    *("sub/.cache/huggingface/x", ".weightops-partial/x", ".weightops-partial", "sub/.weightops-partial/x"),
]


@pytest.mark.parametrize("name", DROPPINGS)
def test_what_clients_left_is_passed_over_and_said(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add(REPO, {**MODEL, name: b"x"}, lfs=())
    assert any(
        "what a client left there is passed over (files: 1)" in warning for warning in fetch(hub, tmp_path).warnings
    )
    assert_complete(tmp_path, MODEL)


@pytest.mark.parametrize("name", ["%2e%2e", "a%5Cb", "%1b", "a%0Ab", "%00"])
def test_names_in_urls_are_no_better(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.static[unquote(name)] = DATA
    with pytest.raises(CorruptInput, match="is not a plain path"):
        fetch(hub, tmp_path / "out", f"{hub.endpoint}/static/files/{name}")
    listed = tmp_path / "list"
    listed.write_text(f"{'0' * 64}  {hub.endpoint}/static/files/{name}\n")
    with pytest.raises(CorruptInput, match=r"is not a plain path|expected a digest and a URL"):
        fetch(hub, tmp_path / "out", str(listed))
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_a_file_that_is_also_a_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"config.json": b"{}", "config.json/child": b"x"})
    with pytest.raises(CorruptInput, match="is a file, and the folder of"):
        fetch(hub, tmp_path / "out")


def test_names_that_some_file_systems_take_for_one_are_warned_of(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"A.json": b"A", "a.json": b"a"})
    if folds_case(tmp_path):
        pytest.skip("this is such a file system: test_collisions.py")
    assert any("differ in case only" in warning for warning in fetch(hub, tmp_path).warnings)
    assert_complete(tmp_path, {"A.json": b"A", "a.json": b"a"})


def test_a_manifest_from_the_repository_does_not_become_ours(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {**MODEL, FINAL: b'{"schema": "weightops-manifest/1", "files": {}}'})
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)
    assert json.loads((tmp_path / FINAL).read_text())["files"].keys() == MODEL.keys()


def link_folder(out: Path, elsewhere: Path) -> None:
    (out / "sub").symlink_to(elsewhere)


def link_file(out: Path, elsewhere: Path) -> None:
    (out / "config.json").symlink_to(elsewhere / "config.json")


def link_to_nowhere(out: Path, elsewhere: Path) -> None:
    (out / "config.json").symlink_to(elsewhere / "new")


def folder_as_file(out: Path, elsewhere: Path) -> None:
    (out / "config.json").mkdir()


def fifo(out: Path, elsewhere: Path) -> None:
    mkfifo(out / "config.json")


def test_a_link_in_the_place_of_our_state_is_refused_and_what_is_not_ours_stays(hub: Hub, tmp_path: Path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (elsewhere / "precious").write_text("x")
    (out / STATE).symlink_to(elsewhere)
    with pytest.raises(CorruptInput, match="is a link"):
        fetch(hub, out)
    (out / STATE).unlink()
    (out / STATE).mkdir()
    (out / STATE / "precious").write_text("x")
    fetch(hub, out)
    assert [path.read_text() for path in (elsewhere / "precious", out / STATE / "precious")] == ["x", "x"]


@pytest.mark.parametrize("prepare", [link_folder, link_file, link_to_nowhere, folder_as_file, fifo])
@pytest.mark.parametrize("late", [False, True])
def test_nothing_is_written_through_links(
    hub: Hub, tmp_path: Path, prepare: Callable[[Path, Path], None], late: bool
) -> None:
    """Also if they appear after the check. A link in the place of a file is replaced then, not followed."""
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (elsewhere / "config.json").write_text("precious")
    hub.add(REPO, {"config.json": b"{}", "sub/config.json": b"[]"})
    if late:

        def at_the_first_byte(name: str, offset: int) -> None:
            if name == "config.json":
                hub.on_body = lambda name, offset: None
                prepare(out, elsewhere)

        hub.on_body = at_the_first_byte
        try:
            fetch(hub, out, workers=1)
        except WeightopsError as error:
            assert_one_clean_sentence(error)
    else:
        prepare(out, elsewhere)
        with pytest.raises(CorruptInput, match=r"(is a link|is no file), so .* cannot be written there") as caught:
            fetch(hub, out)
        assert_one_clean_sentence(caught.value)
        assert hub.bytes_sent() == 0
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {"config.json": "precious"}


def test_nothing_outside_is_pruned(hub: Hub, tmp_path: Path) -> None:
    """Not through a link in place of a folder, and not because a forged manifest says so."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "old").write_text("precious")
    hub.add(REPO, {"config.json": b"{}", "sub/old": b"old"})
    fetch(hub, out)
    shutil.rmtree(out / "sub")
    (out / "sub").symlink_to(elsewhere)
    recorded = json.loads((out / FINAL).read_text())
    recorded["recipe"]["stale"] = ["../elsewhere/old", str(elsewhere / "old")]
    (out / FINAL).write_text(json.dumps(recorded))
    hub.add(REPO, {"config.json": b"[]"})
    try:
        fetch(hub, out, prune=True)
    except WeightopsError as error:
        assert_one_clean_sentence(error)
    assert (elsewhere / "old").read_text() == "precious"
