"""Source files: descriptors are given back, however many files there are and whatever becomes of a run."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import write_checkpoint

import weightops
from weightops.errors import CorruptInput
from weightops.formats.folder import open_checkpoint
from weightops.io.source import FileReader, SourceFile


@contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def read_heads(reader: FileReader, files: list[SourceFile]) -> None:
    for file in files:
        reader.read(file, 0, 8)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "many", {f"t{i:03d}": torch.full((3,), float(i)) for i in range(100)}, shards=100
    )


def test_a_hundred_shards_need_few_descriptors(many: Path) -> None:
    weightops.shard(many, many.parent / "warm")  # imports what it needs
    before = descriptors()
    with few_descriptors(before + 48):
        for workers in (1, 4):
            out = weightops.shard(many, many.parent / f"out{workers}", max_shard_size="source", workers=workers).out
            assert len(list(out.glob("*.safetensors"))) == 100
    assert descriptors() == before


def test_descriptors_are_given_back(many: Path) -> None:
    before = descriptors()
    checkpoint = open_checkpoint(many)
    assert descriptors() == before
    file = SourceFile.at(next(many.glob("*.safetensors")))
    assert descriptors() == before
    with FileReader() as reader:
        reader.read(file, 0, 8)
        assert descriptors() == before + 1
    assert descriptors() == before
    with pytest.raises(weightops.errors.UsageError):
        weightops.save(checkpoint, many)
    assert descriptors() == before


def test_a_reader_keeps_few_files_open_and_looks_at_each_before_it_lets_go(many: Path) -> None:
    files = [SourceFile.at(path) for path in sorted(many.glob("*.safetensors"))]
    before = descriptors()
    with FileReader(max_open=4) as reader:
        for file in files[:6]:
            reader.read(file, 0, 8)
        assert descriptors() == before + 4
        os.utime(files[4].path, ns=(1, 1))
        reader.read(files[3], 0, 8)  # moves to the end of those that are kept
        with pytest.raises(CorruptInput, match="changed while it was being read"):
            read_heads(reader, files[6:10])


def test_what_was_let_go_and_changed_is_noticed_when_it_is_opened_again(many: Path) -> None:
    files = [SourceFile.at(path) for path in sorted(many.glob("*.safetensors"))[:3]]
    with FileReader(max_open=1) as reader:
        for file in files:
            reader.read(file, 0, 8)
        os.utime(files[0].path, ns=(1, 1))
        with pytest.raises(CorruptInput, match="changed while it was being read"):
            reader.read(files[0], 0, 8)
