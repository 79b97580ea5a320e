"""Open files: the same bytes by every system's calls; and what a system lacks is not asked of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from systems import needs, on

from weightops.io.platform import files as here

SYSTEMS = ["here", "plain", "windows"]


@pytest.fixture(params=SYSTEMS)
def files(request: pytest.FixtureRequest) -> ModuleType:
    return here if request.param == "here" else on(request.param, "files")


@contextmanager
def opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def test_what_is_written_anywhere_is_read_there(files: ModuleType, tmp_path: Path) -> None:
    with opened(files.open_to_write(tmp_path / "x", read=True)) as fd:
        assert files.write_at(fd, memoryview(b"late"), 100_000) == 4
        assert files.write_at(fd, memoryview(b"early"), 3) == 5
        buffer = memoryview(bytearray(10))
        assert files.read_at(fd, buffer, 99_999) == 5
        assert bytes(buffer[:5]) == b"\0late"
        assert files.read_at(fd, buffer, 100_004) == 0
    assert (tmp_path / "x").read_bytes() == b"\0\0\0early" + bytes(99_992) + b"late"


def test_threads_do_not_take_each_other_s_places(files: ModuleType, tmp_path: Path) -> None:
    size, pieces = 4096, 64
    wrong: list[int] = []
    with opened(files.open_to_write(tmp_path / "x", read=True)) as fd:

        def work(first: int) -> None:
            buffer = memoryview(bytearray(size))
            for i in range(first, pieces, 4):
                files.write_at(fd, memoryview(bytes([i]) * size), i * size)
                if files.read_at(fd, buffer, i * size) != size or bytes(buffer) != bytes([i]) * size:
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert (tmp_path / "x").read_bytes() == b"".join(bytes([i]) * size for i in range(pieces))


@pytest.mark.parametrize("options", [{}, {"keep": False}, {"append": True}, {"read": True}, {"is_new": True}], ids=str)
@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_links_are_not_written_through(
    files: ModuleType, tmp_path: Path, options: dict[str, bool], target: str
) -> None:
    (tmp_path / "there").write_text("precious")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OSError, match="link") as caught:
        files.open_to_write(tmp_path / "link", **options)
    assert caught.value.errno in (errno.ELOOP, errno.EEXIST)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}
    assert (tmp_path / "there").read_text() == "precious"


def test_a_link_that_comes_in_between_is_not_written_to_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = on("windows", "files")
    (tmp_path / "there").write_text("precious")
    original = os.open

    def late(path: Path, flags: int, mode: int) -> int:
        path.symlink_to("there")
        return original(path, flags, mode)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(OSError, match="link") as caught:
        files.open_to_write(tmp_path / "link", keep=False)
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "there").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "left"), [({}, b"NEWold"), ({"keep": False}, b"NEW"), ({"append": True}, b"oldoldNEW")], ids=str
)
def test_what_is_there_is_kept_as_it_is_said(
    files: ModuleType, tmp_path: Path, options: dict[str, bool], left: bytes
) -> None:
    (tmp_path / "x").write_bytes(b"oldold")
    with opened(files.open_to_write(tmp_path / "x", **options)) as fd:
        os.write(fd, b"NEW")
    assert (tmp_path / "x").read_bytes() == left
    with pytest.raises(FileExistsError):
        files.open_to_write(tmp_path / "x", is_new=True)


@needs("mkfifo")
def test_a_pipe_is_not_waited_for(files: ModuleType, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    try:
        os.close(files.open_to_read(tmp_path / "pipe"))
    except OSError as error:
        assert error.errno == errno.ENXIO  # noqa: PT017


@pytest.mark.parametrize("nbytes", [0, 1, (1 << 20) + 5])
def test_a_filled_file_has_its_bytes_on_the_disk(files: ModuleType, tmp_path: Path, nbytes: int) -> None:
    with opened(files.open_to_write(tmp_path / "x")) as fd:
        files.allocate(fd, 0, max(1, nbytes)) if nbytes else None
        files.fill(fd, nbytes) if nbytes else None
        files.flush(fd)
        assert files.taken_nbytes(os.fstat(fd)) >= nbytes
    assert (tmp_path / "x").read_bytes() == bytes(nbytes)


@needs("posix_fallocate")
def test_a_file_system_that_reserves_nothing_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with opened(here.open_to_write(tmp_path / "x")) as fd:
        here.allocate(fd, 0, 100)
        assert os.fstat(fd).st_size == 0
        here.fill(fd, 3_000_000)
        assert os.fstat(fd).st_blocks * 512 >= 3_000_000


def test_a_disk_that_is_full_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = on("windows", "files")
    monkeypatch.setattr(os, "write", full)
    with opened(files.open_to_write(tmp_path / "x")) as fd, pytest.raises(OSError, match="No space left"):
        files.fill(fd, 100)


def test_a_lock_has_one_holder(files: ModuleType, tmp_path: Path) -> None:
    """Windows' is taken by filelock, which on Linux is flock, so that both can be tried against each other."""
    with opened(files.open_to_write(tmp_path / "x")) as first, opened(files.open_to_write(tmp_path / "x")) as second:
        assert files.try_lock(first) is True
        assert files.try_lock(second) is False
    with opened(files.open_to_write(tmp_path / "x")) as third:
        assert files.try_lock(third) is True


@needs("flock")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_no_locks_are_told_from_a_lock_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with opened(here.open_to_write(tmp_path / "x")) as fd:
        assert here.try_lock(fd) is None


def test_without_direct_writes_files_are_opened_for_buffered_ones(tmp_path: Path) -> None:
    for system in ("plain", "windows"):
        fd, is_direct = on(system, "files").open_direct(tmp_path / "x", keep=True)
        os.close(fd)
        assert not is_direct


def test_macos_asks_the_disk_itself_and_is_content_where_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Fcntl:
        refuses = False

        def fcntl(self, fd: int, request: int) -> None:
            asked.append("disk")
            if self.refuses:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    files = on("plain", "files")
    monkeypatch.setattr(files, "_fcntl", Fcntl())
    monkeypatch.setattr(files, "_FULLFSYNC", 51)
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append("fsync"))
    files.flush(0)
    assert asked == ["disk"]
    Fcntl.refuses = True
    files.flush(0)
    assert asked == ["disk", "disk", "fsync"]
