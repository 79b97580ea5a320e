"""How fast a disk is, found by reading a little; and what dry runs say of time, where there is a rate to go by."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hub import Hub
from safetensors.numpy import save_file

from weightops.cli.main import run
from weightops.engine import estimate
from weightops.engine.estimate import read_rate
from weightops.io.source_file import SourceFile

MIB = 1 << 20


class Disk:
    """A disk that brings 4 MiB in so many seconds, and the clock beside it."""

    def __init__(self, block_s: float) -> None:
        self.now_s, self.reads = 100.0, 0
        self._block_s = block_s

    def read_at(self, fd: int, buffer: memoryview, offset: int) -> int:
        self.now_s += self._block_s
        self.reads += 1
        return 4 * MIB


@pytest.fixture
def large(tmp_path: Path) -> SourceFile:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(128 * MIB)
    return SourceFile.at(path)


@pytest.mark.parametrize(("block_s", "reads"), [(0.01, 20), (0.05, 4), (3.0, 1)])
def test_no_more_is_read_than_for_a_fifth_of_a_second(
    large: SourceFile, monkeypatch: pytest.MonkeyPatch, block_s: float, reads: int
) -> None:
    disk = Disk(block_s)
    # As a system that can read past its page cache, which not all can.
    monkeypatch.setattr(estimate, "open_direct_to_read", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(estimate, "read_at", disk.read_at)
    assert read_rate([large], lambda: disk.now_s) == pytest.approx(4 * MIB / block_s)
    assert disk.reads == pytest.approx(reads, abs=1)


def test_the_end_of_the_file_is_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(65 * MIB))
    times = iter([0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1])
    found = read_rate([SourceFile.at(path)], lambda: next(times))
    assert found is None or found == pytest.approx(33 * MIB / 0.1)  # None on a file system without direct reads


def test_where_there_is_no_rate_to_go_by_none_is_told(large: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SourceFile(large.path, 63 * MIB, 0)
    remote = SourceFile("https://example.org/x", 1 << 40, 0)
    assert read_rate([]) is None
    assert read_rate([small]) is None
    assert read_rate([large, remote]) is None
    assert read_rate([SourceFile(f"{large.path}-gone", 1 << 30, 0)]) is None

    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(estimate, "read_at", fail)
    assert read_rate([large]) is None
    monkeypatch.setattr(estimate, "open_direct_to_read", fail)
    assert read_rate([large]) is None


def test_dry_runs_tell_the_time_that_reading_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    save_file({"a": np.zeros(25_000_000, dtype=np.float32)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text("{sources: {x: ./model}, outputs: {./out: {from: x}}}")
    monkeypatch.setattr("weightops.cli.results.read_rate", lambda files: 1e6)
    for line in ("shard model --out out --dry-run", "run recipe.yaml --dry-run"):
        assert run(line.split()) == 0
        assert "time     at least 2 min at 1.0 MB/s, as fast as this disk was read just now" in capsys.readouterr().out
    monkeypatch.setattr("weightops.cli.results.read_rate", lambda files: None)
    assert run(["shard", "model", "--out", "out", "--dry-run"]) == 0
    assert "time" not in capsys.readouterr().out


def test_a_limit_is_a_rate_to_go_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Hub() as hub:
        hub.add("org/name", {"model.bin": bytes(3_000_000)})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        line = ["download", "org/name", "--out", str(tmp_path / "out"), "--dry-run"]
        assert run([*line, "--limit-rate", "100kB"]) == 0
        assert "time     at least 30 s at 100.0 kB/s (--limit-rate)" in capsys.readouterr().out
        assert run(line) == 0
        assert "time" not in capsys.readouterr().out
