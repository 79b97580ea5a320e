"""Names that a system cannot hold, and names that are one to it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from systems import fold_case, on

from weightops.io.platform import names as here

windows = on("windows", "names")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a:b", "has no : in names"),
        ("sub/what?", "has no ? in names"),
        ("a\\b", r"has no \\ in names"),
        ("a\x1fb", "in names"),
        ("sub./x", "end in a full stop or a space"),
        ("x ", "end in a full stop or a space"),
        *(
            (name, "for a device")
            for name in ("CON", "con", "sub/nul.txt", "Aux.json", "COM1", "lpt9.a.b", "com\u00b2")
        ),
        *((name, "for a device") for name in ("CONIN$", "nul .txt", "PRN/x")),
    ],
)
def test_what_windows_cannot_hold(name: str, reason: str) -> None:
    assert reason.replace("\\\\", "\\") in (windows.why_refused(name) or "")
    assert on("plain", "names").why_refused(name) is None


@pytest.mark.parametrize(
    "name", ["config.json", "console", "com10", "COM", "a.con", ".hidden", "a b", "~$x", "e\u0301"]
)
def test_what_it_can(name: str) -> None:
    assert windows.why_refused(name) is None


@pytest.mark.parametrize("takes_long", [None, 0, 1])
def test_long_paths(monkeypatch: pytest.MonkeyPatch, takes_long: int | None) -> None:
    class Key:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    registry = SimpleNamespace(HKEY_LOCAL_MACHINE=0, OpenKey=lambda *_: Key(), QueryValueEx=lambda *_: (takes_long, 4))
    monkeypatch.setattr(windows, "_winreg", None if takes_long is None else registry)
    assert windows.is_too_long(Path("/" + "a" * 300)) is (takes_long != 1)
    assert not windows.is_too_long(Path("/" + "a" * 200))
    assert not on("plain", "names").is_too_long(Path("/" + "a" * 300))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a", "b", "sub/a"], None),
        (["README.md", "readme.md"], ("README.md", "readme.md")),
        (["Sub/a", "sub/b"], ("Sub", "sub")),
        (["a/b/C", "a/b/c"], ("a/b/C", "a/b/c")),
        (["caf\u00e9", "cafe\u0301"], ("caf\u00e9", "cafe\u0301")),
        (["STRASSE", "stra\u00dfe"], ("STRASSE", "stra\u00dfe")),
        (["a", "A/b"], ("a", "A")),
    ],
)
def test_names_that_are_one_where_case_makes_no_difference(names: list[str], found: tuple[str, str] | None) -> None:
    assert here.taken_for_one(names) == found


@pytest.mark.parametrize("holds", [[], ["x"], ["X", "x"], ["1", "Sub"]], ids=str)
@pytest.mark.parametrize("below", ["", "not/yet/there"])
def test_whether_a_file_system_folds_case_is_seen_from_what_is_there(
    tmp_path: Path, holds: list[str], below: str
) -> None:
    if here.folds_case(tmp_path):
        pytest.skip("this one does")
    for name in holds:
        (tmp_path / name).touch()
    assert not here.folds_case(tmp_path / below)
    if holds == ["X", "x"]:
        return  # which cannot be where it does
    end = fold_case(str(tmp_path.parent))
    try:
        assert here.folds_case(tmp_path / below)
    finally:
        end()
    assert {path.name for path in tmp_path.iterdir()} == set(holds)


def test_of_an_empty_disk_whose_name_says_nothing_the_system_decides(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    assert not here.folds_case(tmp_path / "1") or os.name == "nt"
    assert windows.folds_case(tmp_path / "1")


def test_paths_to_one_place_are_equal(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert here.place_of(tmp_path / "a") == here.place_of(tmp_path / "link") == here.place_of(tmp_path / "a/../a")
    assert here.place_of(tmp_path / "a/x/y") == here.place_of(tmp_path / "link/x/y") != here.place_of(tmp_path / "a/x")
    (tmp_path / "loop").symlink_to("loop")
    assert here.place_of(tmp_path / "loop") != here.place_of(tmp_path)
    if not here.folds_case(tmp_path):
        assert here.place_of(tmp_path / "b") != here.place_of(tmp_path / "B")
        end = fold_case(str(tmp_path))
        try:
            assert here.place_of(tmp_path / "b/c") == here.place_of(tmp_path / "B/C")
            assert here.place_of(tmp_path / "a") == here.place_of(tmp_path / "A")
        finally:
            end()
