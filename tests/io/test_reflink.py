"""Sharing blocks: with the real ioctl where the file system has it, with one that copies where it has not."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from systems import n_open, needs

from weightops.formats.layout import Literal
from weightops.formats.safetensors import safetensors_layout
from weightops.io import reflink
from weightops.io.platform.files import clone_range
from weightops.io.reflink import BLOCK_NBYTES, Extent, header_padding, share, shareable
from weightops.io.source_file import SourceFile
from weightops.spec import DType, TensorSpec

fcntl = pytest.importorskip("fcntl")
pytestmark = needs("ioctl", "posix_fallocate")

BLOCKS = 4


@contextmanager
def opened(folder: Path, source: bytes, target: bytes) -> Iterator[tuple[int, int]]:
    """Two files of these contents, the one to read, the other to write."""
    (folder / "source").write_bytes(source)
    (folder / "target").write_bytes(target)
    source_fd, target_fd = os.open(folder / "source", os.O_RDONLY), os.open(folder / "target", os.O_RDWR)
    try:
        yield source_fd, target_fd
    finally:
        os.close(source_fd)
        os.close(target_fd)


def copying_ioctl(target_fd: int, request: int, argument: bytes) -> int:
    """What a file system with shared blocks does, by copying: whole blocks only, within one source."""
    assert request == 0x4020940D
    source_fd, source_offset, nbytes, target_offset = struct.unpack("=qQQQ", argument)
    size = os.fstat(source_fd).st_size
    ends = (source_offset + nbytes) % BLOCK_NBYTES == 0 or source_offset + nbytes == size
    if source_offset % BLOCK_NBYTES or target_offset % BLOCK_NBYTES or not ends or source_offset + nbytes > size:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    os.pwrite(target_fd, os.pread(source_fd, nbytes, source_offset), target_offset)
    return 0


def test_a_range_is_shared_or_the_target_is_as_it_was(tmp_path: Path) -> None:
    source, target = os.urandom(BLOCKS * BLOCK_NBYTES), bytes(BLOCKS * BLOCK_NBYTES)
    with opened(tmp_path, source, target) as (source_fd, target_fd):
        shared = clone_range(source_fd, BLOCK_NBYTES, target_fd, 2 * BLOCK_NBYTES, BLOCK_NBYTES)
    middle = source[BLOCK_NBYTES : 2 * BLOCK_NBYTES] if shared else bytes(BLOCK_NBYTES)
    expected = bytes(2 * BLOCK_NBYTES) + middle + bytes(BLOCK_NBYTES)
    assert (tmp_path / "target").read_bytes() == expected
    assert (tmp_path / "source").read_bytes() == source


@pytest.mark.parametrize(("source_offset", "target_offset", "nbytes"), [(1, 0, 4096), (0, 8, 4096), (0, 0, 4095)])
def test_ranges_that_are_not_whole_blocks_are_not_shared(
    tmp_path: Path, source_offset: int, target_offset: int, nbytes: int
) -> None:
    source, target = os.urandom(BLOCKS * BLOCK_NBYTES), bytes(BLOCKS * BLOCK_NBYTES)
    with opened(tmp_path, source, target) as (source_fd, target_fd):
        assert clone_range(source_fd, source_offset, target_fd, target_offset, nbytes) is False
    assert (tmp_path / "target").read_bytes() == target


def test_a_pipe_shares_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with opened(tmp_path, bytes(BLOCK_NBYTES), b"") as (source_fd, target_fd):
        assert clone_range(source_fd, 0, writing, 0, BLOCK_NBYTES) is False
        assert clone_range(reading, 0, target_fd, 0, BLOCK_NBYTES) is False
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("number", ["EOPNOTSUPP", "ENOTTY", "EXDEV", "EINVAL", "EBADF", "EPERM", "ETXTBSY"])
def test_every_way_of_saying_no_is_understood(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(getattr(errno, number), number)

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert clone_range(0, 0, 1, 0, BLOCK_NBYTES) is False


def test_a_full_disk_is_no_way_of_saying_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(OSError, match="no space left"):
        clone_range(0, 0, 1, 0, BLOCK_NBYTES)


def test_a_signal_in_between_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[type[OSError] | None] = [InterruptedError, None]

    def interrupted(*_: object) -> int:
        if (error := answers.pop(0)) is not None:
            raise error
        return 0

    monkeypatch.setattr(fcntl, "ioctl", interrupted)
    assert clone_range(0, 0, 1, 0, BLOCK_NBYTES) is True
    assert answers == []


def test_nothing_is_shared_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel takes a length of 0 for all up to the end.
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: pytest.fail("asked"))
    assert clone_range(0, 0, 1, 0, 0) is True


pieces = st.lists(st.tuples(st.integers(0, 3 * 64), st.integers(0, 40), st.booleans()), max_size=8)


@given(pieces)
def test_what_is_shared_and_what_is_written_make_the_file(drawn: list[tuple[int, int, bool]]) -> None:
    """With blocks of 8 bytes: sharing copies whole blocks that lie alike, and never a byte that is wanted elsewhere."""
    source = os.urandom(256)
    extents: list[Extent] = []
    position = 3
    for source_offset, nbytes, follows in drawn:
        last = extents[-1] if extents else Extent(0, 0, 0)
        begin = last.source_offset + last.nbytes if follows else source_offset
        extents.append(Extent(begin, position, max(0, min(nbytes, 256 - begin))))
        position += extents[-1].nbytes
    wanted = bytearray(position)
    for begin, at, nbytes in extents:
        wanted[at : at + nbytes] = source[begin : begin + nbytes]
    shared = shareable(extents, len(source), 8)
    for begin, at, nbytes in shared:
        assert begin % 8 == at % 8 == nbytes % 8 == 0 < nbytes
        assert wanted[at : at + nbytes] == source[begin : begin + nbytes]
    covered = sorted((e.target_offset, e.target_offset + e.nbytes) for e in shared)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(covered))
    inside = {at for start, stop in covered for at in range(start, stop)}
    for begin, at, nbytes in extents:
        if (begin - at) % 8 == 0:
            whole = range(-(-at // 8) * 8, (at + nbytes) // 8 * 8)
            assert inside.issuperset(whole)


def test_small_tensors_that_stay_together_are_shared_together() -> None:
    extents = [Extent(100 + 1000 * i, 8292 + 1000 * i, 1000) for i in range(20)]
    assert shareable(extents, 1 << 20) == [Extent(4096, 12288, 12288)]
    assert shareable([e._replace(target_offset=e.target_offset + 8) for e in extents], 1 << 20) == []


def test_renaming_shares_all_but_the_first_and_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A safetensors file under other names, put together from a padded header, shared blocks and written rests."""
    monkeypatch.setattr(fcntl, "ioctl", copying_ioctl)
    specs = [TensorSpec(DType.F32, (700 + i, 5)) for i in range(4)]
    headers = []
    for prefix in ("", "language_model."):
        first = safetensors_layout([(f"{prefix}{i}", spec) for i, spec in enumerate(specs)], {"format": "pt"}).pieces[0]
        assert isinstance(first, Literal)
        headers.append(first.data)
    data = os.urandom(sum(spec.nbytes for spec in specs))
    source = headers[0] + data
    offset = len(headers[0])
    start = len(headers[1]) + header_padding(len(headers[1]), offset)
    assert (start - offset) % BLOCK_NBYTES == 0
    assert 0 <= start - len(headers[1]) < BLOCK_NBYTES
    extents, position = [], 0
    for spec in sorted(specs, key=lambda spec: spec.shape):
        extents.append(Extent(offset + position, start + position, spec.nbytes))
        position += spec.nbytes
    (shared,) = shareable(extents, len(source))
    assert shared.nbytes > len(data) - 2 * BLOCK_NBYTES
    with opened(tmp_path, source, b"") as (source_fd, target_fd):
        assert clone_range(source_fd, shared.source_offset, target_fd, shared.target_offset, shared.nbytes)
        before, after = shared.source_offset - offset, shared.source_offset - offset + shared.nbytes
        os.pwrite(target_fd, headers[1].ljust(start) + data[:before], 0)
        os.pwrite(target_fd, data[after:], shared.target_offset + shared.nbytes)
    assert (tmp_path / "target").read_bytes() == headers[1].ljust(start) + data


def test_sharing_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflink, "clone_range", lambda *_: True)
    (tmp_path / "source").write_bytes(b"data")
    file = SourceFile.at(tmp_path / "source")
    before = n_open()
    extent = Extent(0, 0, 4)
    assert share(file, [extent], -1) == [extent]
    (tmp_path / "source").write_bytes(b"other data")
    assert share(file, [extent], -1) == []
    assert n_open() == before
