"""Locks: one holder at a time, also where the file system has none and a killed run's name stays behind."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from systems import n_open

from weightops.engine import lock as module
from weightops.engine.lock import LOCK, Lock, is_lock
from weightops.errors import Locked, WeightopsError
from weightops.io.owner import Owner
from weightops.io.platform import files
from weightops.io.platform.machine import boot_id

ELSEWHERE = f"{'0' * 12}-1-1"


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "try_lock", lambda fd: None)


def said(**changes: object) -> str:
    here = {"pid": os.getpid(), "host": platform.node(), "boot": boot_id(), "owner": str(Owner.here())}
    return json.dumps({**here, **changes})


def gone() -> str:
    """The name of a process on this machine that has ended."""
    command = "from weightops.io.owner import Owner; print(Owner.here())"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.strip()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_second_is_told_who_is_first(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    before = n_open()
    with pytest.raises(Locked, match=f"is being written by process {os.getpid()} on ") as caught:
        Lock(tmp_path)
    assert "remove" not in (caught.value.hint or "")
    assert n_open() == before
    lock.release()
    Lock(tmp_path).remove()
    assert names(tmp_path) == set()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = (
        "import os, sys; from pathlib import Path; from weightops.engine.lock import Lock; "
        "lock = Lock(Path(sys.argv[1])); print(); sys.stdout.flush(); sys.stdin.read()"
    )
    child = [sys.executable, "-c", command, str(tmp_path)]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(Locked, match=f"by process {process.pid} on {platform.node()}"):
            Lock(tmp_path)
        process.kill()
        process.wait()
        Lock(tmp_path).release()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_run_is_there_by_its_name(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    assert names(tmp_path) == {LOCK, f"{LOCK}.{Owner.here()}"}
    assert all(map(is_lock, names(tmp_path)))
    before = n_open()
    with pytest.raises(Locked, match=f"by process {os.getpid()} on {platform.node()}"):
        Lock(tmp_path)
    assert n_open() == before
    lock.release()
    assert names(tmp_path) == {LOCK}
    Lock(tmp_path).remove()
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("text", ["", "{}", "its own"])
def test_the_name_of_a_killed_run_is_taken_over(tmp_path: Path, text: str) -> None:
    """Also one that was killed before it had said anything of itself."""
    owner = gone()
    (tmp_path / f"{LOCK}.{owner}").write_text(said(owner=owner, pid=1) if text == "its own" else text)
    lock = Lock(tmp_path)
    assert names(tmp_path) == {LOCK, f"{LOCK}.{Owner.here()}"}
    lock.release()


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("text", ["", "its own"])
def test_of_another_host_it_is_said_what_to_remove(tmp_path: Path, text: str) -> None:
    name = f"{LOCK}.{ELSEWHERE}"
    (tmp_path / name).write_text(said(host="elsewhere", owner=ELSEWHERE, pid=1, boot="x") if text else "")
    with pytest.raises(Locked, match=f"by process 1 on {'elsewhere' if text else 'another machine'}") as caught:
        Lock(tmp_path)
    assert f"if it is gone for good, remove {tmp_path / name} and run" in (caught.value.hint or "")
    assert names(tmp_path) == {LOCK, name}
    (tmp_path / name).unlink()
    Lock(tmp_path).remove()


@pytest.mark.usefixtures("no_locks")
def test_of_two_that_come_at_once_at_most_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one gives its name when this one has, and before it looks round."""
    other = f"{Owner.here().place}-{os.getppid()}-{files_started(os.getppid())}"
    look = Lock._others

    def others(self: Lock, own: Path) -> object:
        (tmp_path / f"{LOCK}.{other}").write_text(said(owner=other, pid=os.getppid()))
        return look(self, own)

    monkeypatch.setattr(Lock, "_others", others)
    with pytest.raises(Locked, match=f"by process {os.getppid()} on"):
        Lock(tmp_path)
    assert names(tmp_path) == {LOCK, f"{LOCK}.{other}"}


def files_started(pid: int) -> int:
    from weightops.io.platform.machine import started

    found = started(pid)
    assert found is not None
    return found


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("text", "is_held"),
    [
        (lambda: said(), True),
        (lambda: said(owner=""), True),  # as version 0.1 said it
        (lambda: said(owner="", pid=2**22 + 1), False),
        (lambda: said(owner=gone()), False),
        (lambda: said(owner=f"{Owner.here().place}-{os.getpid()}-5"), False),  # the number, given again
        (lambda: said(owner=ELSEWHERE), True),  # on this host, in another container
        (lambda: said(owner=ELSEWHERE, boot="an earlier one"), False),
        (lambda: said(owner=ELSEWHERE, host="elsewhere", boot="x"), True),  # nobody can ask there
        (lambda: said(pid="x"), False),
        *((lambda text=text: text, False) for text in ("", "no json", "[" * 4000, "[1]", "{}", "\xff")),
    ],
)
def test_what_an_older_version_has_written_counts_too(tmp_path: Path, text: Callable[[], str], is_held: bool) -> None:
    written = text()
    (tmp_path / LOCK).write_text(written)
    if is_held:
        with pytest.raises(Locked, match="is being written by process") as caught:
            Lock(tmp_path)
        assert ("remove" in (caught.value.hint or "")) is (ELSEWHERE in written)
        assert (tmp_path / LOCK).read_text() == written
        assert names(tmp_path) == {LOCK}
    else:
        lock = Lock(tmp_path)
        assert json.loads((tmp_path / LOCK).read_bytes())["pid"] == os.getpid()
        lock.release()


@pytest.mark.parametrize("text", ["", "{}", '{"pid": 1}', "[]", "[" * 4000])
def test_a_holder_that_says_nothing_of_itself(tmp_path: Path, text: str) -> None:
    lock = Lock(tmp_path)
    os.ftruncate(lock._fd, 0)
    os.write(lock._fd, text.encode())
    with pytest.raises(Locked, match="by another process"):
        Lock(tmp_path)
    lock.release()


def test_the_first_byte_of_a_lock_need_not_be_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lock(tmp_path)

    def read_at(fd: int, buffer: memoryview, offset: int) -> int:
        if offset == 0:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return files.read_at(fd, buffer, offset)

    monkeypatch.setattr(module, "read_at", read_at)
    with pytest.raises(Locked, match=f"by process {os.getpid()} on"):
        Lock(tmp_path)
    lock.release()


def test_a_lock_that_was_removed_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def try_lock(fd: int) -> bool | None:
        done = files.try_lock(fd)
        os.unlink(tmp_path / LOCK)
        return done

    monkeypatch.setattr(module, "try_lock", try_lock)
    before = n_open()
    with pytest.raises(Locked, match="is being written by another process"):
        Lock(tmp_path)
    assert n_open() == before


def test_a_lock_is_let_go_first_where_what_is_open_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = Lock(tmp_path)
    unlink, before = os.unlink, n_open()

    def refusing(path: Path, **more: object) -> None:
        if n_open() == before:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path)

    monkeypatch.setattr(os, "unlink", refusing)
    lock.remove()
    assert names(tmp_path) == set()


def test_a_link_in_its_place_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / LOCK).symlink_to("elsewhere")
    with pytest.raises(WeightopsError, match=r"weightops\.lock: cannot be written"):
        Lock(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "precious"
