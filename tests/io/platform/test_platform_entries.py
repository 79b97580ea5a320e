"""What stands in folders: a name that something has is never given to another thing, by whatever calls."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from systems import needs, on

from weightops.io.platform import entries as here


@pytest.fixture(params=["here", "plain", "windows"])
def entries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "here":
        return here
    found = on(request.param, "entries")
    if request.param == "windows":
        rename = os.rename

        def refusing(source: Path, target: Path) -> None:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            rename(source, target)

        monkeypatch.setattr(os, "rename", refusing)
        monkeypatch.setattr(found, "_WAITS_S", (0.0,))
    return found


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)


WITHOUT: dict[str, tuple[str, ...]] = {"with links": (), "without links": ("link",), "without both": ("link", "rename")}


@pytest.mark.parametrize("lacking", WITHOUT)
@pytest.mark.parametrize(
    "make",
    [
        None,
        lambda path: path.write_text("theirs"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("source"),
    ],
    ids=["free", "file", "folder", "dangling", "link to it"],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_a_name_is_given_unless_anything_has_it(
    entries: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lacking: str,
    make: Callable[[Path], object] | None,
    is_open: bool,
) -> None:
    (tmp_path / "source").write_text("ours")
    target = tmp_path / "target"
    if make is not None:
        make(target)
    before = target.lstat() if make is not None else None
    if "link" in WITHOUT[lacking]:
        no_links(monkeypatch)
    if "rename" in WITHOUT[lacking]:
        monkeypatch.setattr(entries, "c_function", lambda name: None)

    def give() -> None:
        if is_open:
            with entries.folder_below(tmp_path, []) as folder:
                folder.give(tmp_path / "source", "target")
        else:
            entries.give_name(tmp_path / "source", target)

    if before is None:
        give()
        assert target.read_text() == "ours"
    else:
        with pytest.raises(FileExistsError):
            give()
        assert os.path.samestat(target.lstat(), before)
        assert (tmp_path / "source").read_text() == "ours"


def test_a_name_that_is_taken_at_the_last_moment_stays_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without links, and after it was looked whether the name is free."""
    no_links(monkeypatch)
    (tmp_path / "source").write_text("ours")
    original = here._rename_at

    def late(*arguments: object) -> int:
        (tmp_path / "target").write_text("theirs")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(here, "_rename_at", late)
    for has_rename in (True, False):
        if not has_rename:
            monkeypatch.setattr(here, "c_function", lambda name: None)
        with pytest.raises(FileExistsError):
            here.give_name(tmp_path / "source", tmp_path / "target")
        assert (tmp_path / "target").read_text() == "theirs"
        (tmp_path / "target").unlink()


def test_a_name_taken_for_a_file_that_is_gone_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_links(monkeypatch)
    monkeypatch.setattr(here, "c_function", lambda name: None)
    with pytest.raises(FileNotFoundError):
        here.give_name(tmp_path / "source", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["free", "empty", "full", "file", "link"])
def test_a_folder_takes_the_place_of_an_empty_one_at_most(entries: ModuleType, tmp_path: Path, taken: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_text("ours")
    target = tmp_path / "target"
    if taken in ("empty", "full"):
        target.mkdir()
    if taken == "full":
        (target / "x").write_text("theirs")
    if taken == "file":
        target.write_text("theirs")
    if taken == "link":
        (tmp_path / "other").mkdir()
        target.symlink_to("other")
    if taken in ("free", "empty"):
        entries.rename(tmp_path / "source", target)
        assert (target / "x").read_text() == "ours"
        return
    with pytest.raises(OSError, match=r".") as caught:
        entries.rename(tmp_path / "source", target)
    assert caught.value.errno in entries.TAKEN
    assert (tmp_path / "source/x").read_text() == "ours"
    assert target.is_symlink() or (target if taken == "file" else target / "x").read_text() == "theirs"


def test_two_names_are_exchanged_or_both_stay(entries: ModuleType, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    done = entries.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / ("b" if done else "a") / "a").exists()
    assert (tmp_path / ("a" if done else "b") / "b").exists()
    assert not entries.exchange(tmp_path / "a", tmp_path / "nothing")


@needs("symlink")
@pytest.mark.parametrize("at", ["root", "root/sub", "root/sub/deep"])
def test_below_the_root_no_link_is_followed(entries: ModuleType, tmp_path: Path, at: str) -> None:
    (tmp_path / "elsewhere/sub/deep").mkdir(parents=True)
    (tmp_path / at).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / at).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source").write_text("x")

    def put() -> None:
        with entries.folder_below(tmp_path / "root", ["sub", "deep"]) as folder:
            folder.replace(tmp_path / "source", "x")
            folder.flush()

    if at == "root":
        put()  # who says where to write may say it by a link
        assert (tmp_path / "elsewhere/sub/deep/x").read_text() == "x"
        return
    with pytest.raises(OSError, match=r".") as caught:
        put()
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    assert not list((tmp_path / "elsewhere").rglob("x"))


def test_a_file_in_the_place_of_a_folder_is_none(entries: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sub").write_text("theirs")
    with pytest.raises(NotADirectoryError):
        with entries.folder_below(tmp_path, ["sub"]):
            pass


def test_on_windows_who_looks_at_a_new_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = on("windows", "entries")
    (tmp_path / "source").write_text("x")
    original, calls = os.replace, []

    def busy(*arguments: Path, **more: object) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        original(*arguments)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(entries, "_WAITS_S", (0.0, 0.0, 0.0))
    entries.replace_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "x"
    calls.clear()
    monkeypatch.setattr(entries, "_WAITS_S", (0.0,))
    with pytest.raises(PermissionError):
        entries.replace_file(tmp_path / "target", tmp_path / "other")


def test_a_junction_is_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Windows: what looks like a folder and leads to another one."""
    found = os.lstat(tmp_path)
    junction = SimpleNamespace(st_mode=found.st_mode, st_reparse_tag=0xA0000003)
    assert here.is_real_folder(found)
    assert not here.is_real_folder(junction)  # type: ignore[arg-type]
    monkeypatch.setattr(os, "lstat", lambda path: junction)
    assert here.is_link(tmp_path)


def test_folders_are_flushed_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    on("windows", "entries").flush_folder(tmp_path)
    assert flushed == []
    on("plain", "entries").flush_folder(tmp_path)
    assert len(flushed) == 1
