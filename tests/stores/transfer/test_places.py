"""Files that stand in a download's folder already: whose they are, which are kept, and which are replaced."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fetching import REPO, WEIGHTS, assert_complete, content, fetch, files
from hub import Hub

from weightops.errors import CorruptInput, OutputExists
from weightops.stores.transfer import transfer

FILES = {"config.json": b"{}", "README.md": b"# a model", WEIGHTS: content(300_000)}
MINE = b"my own"


@pytest.fixture
def hub() -> object:
    with Hub() as found:
        found.add(REPO, FILES)
        yield found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("data", [MINE, b""], ids=["other", "empty"])
def test_a_file_that_no_download_brought_is_not_replaced(hub: Hub, tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OutputExists, match=f"{name} is there: no download brought it") as caught:
        fetch(hub, tmp_path)
    assert "--overwrite" in (caught.value.hint or "")
    assert files(tmp_path) == {name: data}
    assert fetch(hub, tmp_path, exclude=[name]).manifest is not None
    assert files(tmp_path) == FILES | {name: data}
    fetch(hub, tmp_path, overwrite=True)
    assert_complete(tmp_path, FILES)


@pytest.mark.parametrize("name", FILES)
def test_one_of_the_same_size_is_compared_and_kept_or_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    other = bytes(byte ^ 1 for byte in FILES[name])
    (tmp_path / name).write_bytes(other)
    with pytest.raises(OutputExists, match=f"{name} is there: no download brought it"):
        fetch(hub, tmp_path)
    assert (tmp_path / name).read_bytes() == other
    (tmp_path / name).write_bytes(FILES[name])
    inode = (tmp_path / name).stat().st_ino
    fetch(hub, tmp_path)
    assert_complete(tmp_path, FILES)
    assert (tmp_path / name).stat().st_ino == inode


def test_other_files_in_the_folder_mean_nothing(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_bytes(MINE)
    fetch(hub, tmp_path)
    assert files(tmp_path) == FILES | {"thesis.txt": MINE}
    fetch(hub, tmp_path, prune=True)
    assert files(tmp_path)["thesis.txt"] == MINE


def test_what_a_download_brought_is_its_own(hub: Hub, tmp_path: Path) -> None:
    """Files of an earlier version are replaced, and so is one that was damaged since."""
    fetch(hub, tmp_path)
    (tmp_path / "config.json").write_bytes(b"cut")
    fetch(hub, tmp_path)
    assert_complete(tmp_path, FILES)
    newer = FILES | {"config.json": b'{"a": 1}'}
    hub.add(REPO, newer)
    fetch(hub, tmp_path)
    assert_complete(tmp_path, newer)


def test_a_url_without_a_digest_replaces_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.static["x.bin"] = content(1000)
    (tmp_path / "x.bin").write_bytes(content(1000))
    with pytest.raises(OutputExists, match=r"x\.bin is there"):
        fetch(hub, tmp_path, f"{hub.endpoint}/static/files/x.bin")
    fetch(hub, tmp_path, f"{hub.endpoint}/static/files/x.bin", overwrite=True)
    fetch(hub, tmp_path, f"{hub.endpoint}/static/files/x.bin")


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("make", [lambda path: path.write_bytes(MINE), lambda path: path.symlink_to("/dev/null")])
def test_a_file_that_appears_while_it_is_fetched_stays(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], has_links: bool
) -> None:
    original = transfer.move_into

    def move_into(root: Path, name: str, source: Path, *, may_replace: bool = True) -> None:
        if name == WEIGHTS:
            make(root / name)
        original(root, name, source, may_replace=may_replace)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "move_into", move_into)
        if not has_links:
            patch.setattr(os, "link", no_link)
        with pytest.raises(OutputExists, match=f"{WEIGHTS} is there"):
            fetch(hub, tmp_path)
    for _ in range(2):
        assert (tmp_path / WEIGHTS).is_symlink() or (tmp_path / WEIGHTS).read_bytes() == MINE
        with pytest.raises((OutputExists, CorruptInput), match=WEIGHTS):
            fetch(hub, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    fetch(hub, tmp_path)
    assert_complete(tmp_path, FILES)


def no_link(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_file_system_without_hard_links_will_do(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_link)
    fetch(hub, tmp_path)
    assert_complete(tmp_path, FILES)
