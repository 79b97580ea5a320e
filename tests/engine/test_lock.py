"""Locks: one holder at a time, also where the file system has none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from pathlib import Path

import pytest

from weightops.engine.lock import take_lock
from weightops.errors import Locked, WeightopsError
from weightops.io.owner import boot_id


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def holder(**changes: object) -> str:
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "boot": boot_id(), **changes})


def test_the_second_is_told_who_is_first(tmp_path: Path) -> None:
    fd = take_lock(tmp_path / "lock")
    with pytest.raises(Locked, match=f"is being written by process {os.getpid()} on "):
        take_lock(tmp_path / "lock")
    os.close(fd)
    os.close(take_lock(tmp_path / "lock"))


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("said", "is_held"),
    [
        ({}, True),
        ({"host": "elsewhere"}, True),  # nobody can ask there
        ({"boot": "an earlier one"}, False),
        ({"pid": 2**22 + 1}, False),
        ({"pid": "x"}, False),
        ("", False),
        ("no json", False),
        ("[" * 4000, False),
        ("[1]", False),
        ("{}", False),
    ],
    ids=str,
)
def test_without_locks_the_process_in_the_file_is_asked_for(
    tmp_path: Path, said: str | dict[str, object], is_held: bool
) -> None:
    path = tmp_path / "lock"
    said = said if isinstance(said, str) else holder(**said)
    path.write_text(said)
    if is_held:
        with pytest.raises(Locked, match="is being written by process"):
            take_lock(path)
        assert path.read_text() == said
    else:
        os.close(take_lock(path))
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_process_that_may_not_be_asked_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_locks: None) -> None:
    def kill(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / "lock").write_text(holder())
    with pytest.raises(Locked, match="is being written by process"):
        take_lock(tmp_path / "lock")


@pytest.mark.parametrize("said", ["", "{}", '{"pid": 1}', "[]", "[" * 4000])
def test_a_holder_that_says_nothing_of_itself(tmp_path: Path, said: str) -> None:
    (tmp_path / "lock").write_text(said)
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Locked, match="by another process"):
            take_lock(tmp_path / "lock")


def test_a_lock_that_was_removed_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    original = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        original(fd, operation)
        path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Locked, match="is being written by another process"):
        take_lock(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_in_its_place_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(WeightopsError, match="lock: cannot be written"):
        take_lock(tmp_path / "lock")
    assert (tmp_path / "elsewhere").read_text() == "precious"
