"""Writing on file systems that have no O_DIRECT, or only say so when it is used, or cannot reserve space."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from systems import n_open, needs

from weightops.errors import NoRoom, WeightopsError
from weightops.io.direct import ALIGNMENT, DirectFile
from weightops.io.platform.machine import page_memory


def no_direct_open(patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    original = os.open

    def call(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            seen.append("open")
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, mode)

    patch.setattr(os, "open", call)


def no_direct_write(patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    """As some network file systems do: the descriptor opens, and its first write fails."""
    import fcntl

    original = os.pwrite

    def call(fd: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            seen.append("write")
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(fd, data, offset)

    patch.setattr(os, "pwrite", call)


def no_reserving(patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    def call(fd: int, offset: int, nbytes: int) -> None:
        seen.append("reserve")
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    patch.setattr(os, "posix_fallocate", call)


def short_writes(patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    original = os.pwrite

    def call(fd: int, data: memoryview, offset: int) -> int:
        seen.append("short")
        return original(fd, data[: max(ALIGNMENT, len(data) // 3 // ALIGNMENT * ALIGNMENT)], offset)

    patch.setattr(os, "pwrite", call)


@pytest.mark.parametrize(
    "without",
    [
        pytest.param(act, marks=needs(call))
        for act, call in (
            (no_direct_open, "O_DIRECT"),
            (no_direct_write, "O_DIRECT"),
            (no_reserving, "posix_fallocate"),
            (short_writes, "pwrite"),
        )
    ],
)
@pytest.mark.parametrize("nbytes", [1, ALIGNMENT, 3 * ALIGNMENT + 17, 300_001])
def test_the_same_bytes_without(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without: Callable[[pytest.MonkeyPatch, list[str]], None],
    nbytes: int,
) -> None:
    seen: list[str] = []
    without(monkeypatch, seen)
    data = bytes(i * 7 % 251 for i in range(nbytes))
    block_nbytes = 32 * ALIGNMENT
    block = memoryview(page_memory(block_nbytes))
    file = DirectFile(tmp_path / "file", nbytes)
    for start in range(0, nbytes, block_nbytes):
        piece = data[start : start + block_nbytes]
        block[: len(piece)] = piece
        file.write(start, block, len(piece))
    file.close()
    assert (tmp_path / "file").read_bytes() == data
    assert seen


def write_one_block(path: Path) -> None:
    file = DirectFile(path, ALIGNMENT)
    try:
        file.write(0, memoryview(page_memory(ALIGNMENT)), ALIGNMENT)
        file.close()
    finally:
        file.abandon()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=needs(name)) for name in ("open", "pwrite", "posix_fallocate", "ftruncate", "fsync")],
)
@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, WeightopsError), (errno.ENOSPC, NoRoom)])
def test_what_the_system_refuses_names_the_file_and_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, kind: type[WeightopsError]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = n_open()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(kind, match=r"file: (the disk is full|cannot be written)"):
            write_one_block(tmp_path / "file")
    assert n_open() == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "file").symlink_to("elsewhere")
    with pytest.raises(WeightopsError, match="file: cannot be written"):
        DirectFile(tmp_path / "file", 10)
    assert (tmp_path / "elsewhere").read_text() == "precious"
