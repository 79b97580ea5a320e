"""Source files: what is opened is closed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import write_checkpoint
from systems import mkfifo, n_open, opened_below

import weightops
from weightops.errors import CorruptInput, SourceMissing
from weightops.io.digests import hash_file
from weightops.io.source_file import SourceFile
from weightops.stores.local import read_source
from weightops.stores.reader import FileReader

resource = pytest.importorskip("resource")


@pytest.fixture
def files(tmp_path: Path) -> list[SourceFile]:
    for i in range(9):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 10)
    return [SourceFile.at(tmp_path / f"{i}") for i in range(9)]


def test_looking_and_reading_leave_nothing_open(files: list[SourceFile], tmp_path: Path) -> None:
    assert opened_below(tmp_path) == []
    read_source(tmp_path / "0")
    hash_file(tmp_path / "0", ["md5"])
    mkfifo(tmp_path / "pipe")
    for _ in range(3):
        with pytest.raises(CorruptInput, match="not a regular file"):
            SourceFile.at(tmp_path / "pipe")
        with pytest.raises(SourceMissing, match="no such file"):
            SourceFile.at(tmp_path / "none")
    assert opened_below(tmp_path) == []


def test_a_reader_keeps_few_files_open_and_closes_them(files: list[SourceFile], tmp_path: Path) -> None:
    with FileReader(max_open=3) as reader:
        for file in [*files, *reversed(files)]:
            assert reader.read(file, 3, 4) == (tmp_path / file.name).read_bytes()[3:7]
            assert len(opened_below(tmp_path)) <= 3
        assert opened_below(tmp_path) == ["0", "1", "2"]
    assert opened_below(tmp_path) == []


def test_a_file_that_changed_is_noticed_also_when_it_makes_room(files: list[SourceFile], tmp_path: Path) -> None:
    with FileReader(max_open=1) as reader:
        reader.read(files[0], 0, 1)
        (tmp_path / "0").write_bytes(b"longer than before")
        with pytest.raises(CorruptInput, match="changed while it was being read"):
            reader.read(files[1], 0, 1)
    with FileReader() as reader, pytest.raises(CorruptInput, match="changed while it was being read"):
        reader.read(files[0], 0, 1)


@contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hundred_shards_need_few_descriptors(tmp_path: Path) -> None:
    tensors = {f"t{i:03d}": torch.full((3,), float(i)) for i in range(100)}
    many = write_checkpoint(tmp_path / "many", tensors, shards=100)
    weightops.shard(many, tmp_path / "warm")  # imports what it needs
    with few_descriptors(n_open() + 48):
        for workers in (1, 4):
            out = weightops.shard(many, tmp_path / f"out{workers}", max_shard_size="source", workers=workers).out
            assert len(list(out.glob("*.safetensors"))) == 100
    assert opened_below(tmp_path) == []


def test_what_will_be_read_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty range would mean the rest of the file."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("weightops.stores.reader.advise_soon", lambda fd, start, nbytes: asked.append((start, nbytes)))
    (tmp_path / "large").write_bytes(bytes(8 << 20))
    file, block = SourceFile.at(tmp_path / "large"), memoryview(bytearray(1 << 20))
    with FileReader() as read:
        for offset in (0, 1 << 20, 1 << 20, 2 << 20, 0):
            read.read_into(file, offset, block)
    assert asked == [(1 << 20, 16 << 20), (17 << 20, 1 << 20), (18 << 20, 1 << 20), (1 << 20, 16 << 20)]
