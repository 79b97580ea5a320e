"""Sharing blocks with the source: the same files whether or not the file system can, and less to write where it can.

A file system that can is emulated by an ioctl that copies: tests must not depend on the one that they run on.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from killing import forked
from safetensors.torch import load_file
from support import digests, given_tensor, same_bits, write_checkpoint
from systems import needs

import weightops
from weightops.checkpoint import Checkpoint
from weightops.cli.main import run as command
from weightops.engine import stream
from weightops.engine.control import Control, Silent
from weightops.errors import CorruptInput, PlanDiffers, SourceMissing, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.io.direct import ALIGNMENT, DirectFile
from weightops.io.platform.machine import page_memory
from weightops.io.reflink import BLOCK_NBYTES, Extent, fit_header
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.arrange import Agreed
from weightops.ops.elementwise import Add, Reinterpret
from weightops.ops.measures.witness import Witness
from weightops.plan import Plan, make_plan
from weightops.recipes.execute import Result
from weightops.spec import DType

fcntl = pytest.importorskip("fcntl")
pytestmark = needs("ioctl", "pwrite", "posix_fallocate")

WEIGHTS = "model.safetensors"


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(300 + i, 999, generator=generator).half() for i in range(6)}
    tensors |= {f"layers.{i}.norm": torch.randn(999, generator=generator).half() for i in range(6)}
    return tensors | {"wide": torch.randn(200, 1000, generator=generator), "empty": torch.zeros(0, 3)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", state(), shards=2)


class Disk:
    """Counts the bytes that are written and shared. `can` says which requests to share are granted."""

    def __init__(self, patch: pytest.MonkeyPatch, can: Callable[[int], bool] = lambda count: True) -> None:
        self.written = self.shared = self.count = 0
        self._can = can
        self._pwrite = os.pwrite
        patch.setattr(os, "pwrite", self.pwrite)
        patch.setattr(fcntl, "ioctl", self.ioctl)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.written += len(data)
        return self._pwrite(fd, data, offset)

    def ioctl(self, target_fd: int, request: int, argument: bytes) -> int:
        source_fd, source_offset, nbytes, target_offset = struct.unpack("=qQQQ", argument)
        assert source_offset % BLOCK_NBYTES == target_offset % BLOCK_NBYTES == nbytes % BLOCK_NBYTES == 0 < nbytes
        assert source_offset + nbytes <= os.fstat(source_fd).st_size
        self.count += 1
        if not self._can(self.count):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        buffered = os.open(f"/proc/self/fd/{target_fd}", os.O_WRONLY)  # its own may want aligned memory
        os.pwritev(buffered, [os.pread(source_fd, nbytes, source_offset)], target_offset)
        os.close(buffered)
        self.shared += nbytes
        return 0


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize(("size", "share"), [("100MB", 0.3), ("2MB", 0.4), ("source", 0.98)])
def test_the_same_tensors_with_less_to_write(
    model: Path, monkeypatch: pytest.MonkeyPatch, size: str, share: float
) -> None:
    out, disk = model.parent, Disk(monkeypatch)
    plain = weightops.shard(model, out / "plain", add_prefix="x.", max_shard_size=size)
    alone, disk.written = disk.written, 0
    result = weightops.shard(model, out / "out", add_prefix="x.", max_shard_size=size, reflink=True)
    assert disk.shared > share * alone
    assert disk.written + disk.shared <= alone + 2 * BLOCK_NBYTES * len(result.plan.shards)
    assert same_bits(written(out / "out"), {f"x.{n}": t for n, t in state().items()})
    assert result.manifest is not None
    assert plain.manifest is not None
    assert result.manifest.content_id == plain.manifest.content_id
    assert {n: t.xxh3_128 for n, t in result.manifest.tensors.items()} == {
        n: t.xxh3_128 for n, t in plain.manifest.tensors.items()
    }
    assert weightops.verify(out / "out", content=True).verdict
    for name in plain.plan.shard_nbytes:
        ours, theirs = (header(out / folder / name) for folder in ("out", "plain"))
        assert ours.rstrip(b" ") == theirs.rstrip(b" ")
        assert len(ours) % 8 == 0


def header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_one_source_file_under_other_names_is_shared_but_for_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, notes = Disk(monkeypatch), Notes()
    source = write_checkpoint(tmp_path / "one", state())
    weightops.shard(source, tmp_path / "out", add_prefix="model.", reflink=True, control=Control(notes))
    total = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert disk.count == 1
    assert 0 < total - disk.shared <= len(header(tmp_path / "out" / WEIGHTS)) + 8 + 2 * BLOCK_NBYTES
    assert notes.said == [f"{WEIGHTS}: {disk.shared / 1e6:.1f} of {total / 1e6:.1f} MB shared with the source"]


@pytest.mark.parametrize("can", [lambda count: False, lambda count: count % 2 == 0, None], ids=["no", "some", "real"])
@pytest.mark.parametrize("block", [4096, 1 << 22])
def test_a_file_system_that_cannot_gives_the_same_files(
    model: Path, monkeypatch: pytest.MonkeyPatch, can: Callable[[int], bool] | None, block: int
) -> None:
    options = {"drop": ["layers.3.weight"], "max_shard_size": "3MB", "reflink": True}
    with monkeypatch.context() as patch:
        Disk(patch)
        weightops.shard(model, model.parent / "out", **options)
    monkeypatch.setattr(stream, "BLOCK_NBYTES", block)
    if can is not None:
        Disk(monkeypatch, can)
    weightops.shard(model, model.parent / "unable", **options)
    assert digests(model.parent / "unable") == digests(model.parent / "out")


def test_killed_anywhere_it_ends_with_the_same_files(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch)
    out = model.parent / "out"
    options = ["--max-shard-size", "2MB", "--add-prefix", "x.", "--reflink", "--workers", "1"]
    arguments = ["shard", str(model), "--out", str(out), *options]
    assert command([*arguments[:3], str(model.parent / "reference"), *arguments[4:], "--quiet"]) == 0
    kept = set()
    for fatal in (8, 13, 17, 24, 31, 38):
        assert forked(arguments, fatal) == -9
        kept.add(len(list((model.parent / "out.partial").glob("output/*.safetensors"))))
        assert forked(arguments, None) == 0
        assert digests(out) == digests(model.parent / "reference")
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    assert len(kept) > 2


def test_a_partial_output_is_not_continued_with_other_headers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Control):
        def check(self) -> None:
            if (model.parent / "out.partial/output" / WEIGHTS.replace(".", "-00001-of-00003.")).exists():
                self.cancel()
            super().check()

    options = {"max_shard_size": "2MB", "workers": 1}
    with pytest.raises(weightops.errors.Interrupted, match="interrupted"):
        weightops.shard(model, model.parent / "out", reflink=True, control=Stops(), **options)
    with pytest.raises(PlanDiffers, match="reflink was true, now false"):
        weightops.shard(model, model.parent / "out", **options)
    (model.parent / "moved").mkdir()
    model = model.rename(model.parent / "moved" / "model")
    assert weightops.shard(model, model.parents[1] / "out", reflink=True, **options).resumed


def plan(checkpoint: Checkpoint) -> Plan:
    return make_plan(checkpoint, {}, reflink=True)


def test_layouts_survive_json(model: Path) -> None:
    ours = plan(open_checkpoint(model))
    again = Plan.from_json(json.loads(json.dumps(ours.to_json())))
    assert [again.layout(s) for s in again.shards] == [ours.layout(s) for s in ours.shards]
    assert ours.layout(ours.shards[0]) != make_plan(open_checkpoint(model), {}).layout(ours.shards[0])
    assert again.fingerprint == ours.fingerprint != make_plan(open_checkpoint(model), {}).fingerprint


def save(tensors: Mapping[str, LazyTensor], out: Path, **options: bool) -> Result:
    return weightops.save(Checkpoint("made", tensors), out, **options)


def test_what_is_computed_is_written_between_what_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "one", state()))
    one = given_tensor(torch.ones(303, 999).half())
    tensors = {**source, "layers.3.weight": LazyTensor.make(Add(), source["layers.3.weight"], one)}
    disk = Disk(monkeypatch)
    save(tensors, tmp_path / "out", reflink=True)
    assert disk.count == 2
    assert disk.shared + one.nbytes > source.nbytes - 6 * BLOCK_NBYTES
    expected = {**state(), "layers.3.weight": state()["layers.3.weight"] + 1}
    assert same_bits(load_file(tmp_path / "out" / WEIGHTS), expected)
    assert weightops.verify(tmp_path / "out").verdict


def test_ops_that_change_no_bytes_are_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "one", state()))
    tensors = dict(source)
    for i, op in enumerate((Witness("w"), Reinterpret(DType.F16, (999, 301)), Agreed("differ"))):
        tensors[f"layers.{i}.weight"] = LazyTensor.make(op, source[f"layers.{i}.weight"])
    disk = Disk(monkeypatch)
    save(tensors, tmp_path / "out", reflink=True)
    assert disk.count == 1
    assert disk.shared > source.nbytes - 2 * BLOCK_NBYTES
    assert weightops.verify(tmp_path / "out", content=True).verdict


def test_what_is_shared_is_digested_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "one", state()))
    disk = Disk(monkeypatch)
    wrong = Witness("w", "0" * 32, "not what it should be", "corrupt")
    tensors = {**source, "wide": LazyTensor.make(wrong, source["wide"])}
    with pytest.raises(CorruptInput, match="not what it should be"):
        save(tensors, tmp_path / "out", reflink=True)
    assert disk.shared
    assert not (tmp_path / "out").exists()


def test_torch_files_are_shared_where_they_fit_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "source" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save(state(), path)
    disk = Disk(monkeypatch)
    weightops.shard(path.parent, tmp_path / "out", reflink=True)
    assert disk.shared >= 500_000  # each storage lies at a distance of its own: of one at least
    assert same_bits(load_file(tmp_path / "out" / WEIGHTS), state())
    data = bytearray(path.read_bytes())
    data[data.index(state()["wide"].numpy().tobytes()[:64]) + 700_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptInput, match="CRC-32"):
        weightops.shard(path.parent, tmp_path / "again", reflink=True)
    assert not (tmp_path / "again").exists()


def test_a_source_at_odd_bytes_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "one", state()) / WEIGHTS
    weightops.shard(source.parent, tmp_path / "plain")
    data, text = source.read_bytes(), header(source)
    source.write_bytes((len(text) + 4).to_bytes(8, "little") + text + b"    " + data[8 + len(text) :])
    disk = Disk(monkeypatch)
    weightops.shard(source.parent, tmp_path / "out", reflink=True)
    assert disk.count == 0
    assert digests(tmp_path / "out")[WEIGHTS] == digests(tmp_path / "plain")[WEIGHTS]


def test_a_source_that_changes_is_noticed_though_its_blocks_were_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "one", state()) / WEIGHTS
    disk = Disk(monkeypatch)
    original = disk.ioctl

    def ioctl(*arguments: int | bytes) -> int:
        done = original(*arguments)
        os.utime(source, ns=(1, 1))
        return done

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(CorruptInput, match="changed while it was being read"):
        weightops.shard(source.parent, tmp_path / "out", reflink=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["touched", "gone"])
def test_of_another_file_than_was_planned_nothing_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "source"
    path.write_bytes(bytes(1 << 20))
    shared = {SourceFile.at(path): [Extent(0, 0, 1 << 20)]}
    disk = Disk(monkeypatch)
    if change == "touched":
        os.utime(path, ns=(1, 1))
        DirectFile(tmp_path / "out", 1 << 20, shared=shared).close()
    else:
        path.unlink()
        with pytest.raises(SourceMissing, match="source: no such file"):
            DirectFile(tmp_path / "out", 1 << 20, shared=shared)
    assert disk.count == 0


def test_what_cannot_be_shared_is_refused(model: Path) -> None:
    out = model.parent / "out"
    with pytest.raises(UsageError, match="torch files cannot share blocks"):
        weightops.shard(model, out, reflink=True, format="torch")
    listing = model.parent / "list.md5"
    listing.write_text(f"{'0' * 32}  {WEIGHTS}\n")
    with pytest.raises(UsageError, match=r"list\.md5 lists digests of files"):
        weightops.shard(model, out, reflink=True, expect=listing)
    sources, tensors = {"a": str(model)}, {"b": {"shard": {"source": "a"}}}
    with pytest.raises(UsageError, match=r"outputs\..*reflink: expected true or false"):
        weightops.run({"sources": sources, "tensors": tensors, "outputs": {str(out): {"from": "b", "reflink": 1}}})
    plain = weightops.shard(model, model.parent / "plain").out / "weightops-manifest.json"
    recipe = {"from": "b", "reflink": True, "expect": str(plain)}
    (result,) = weightops.run({"sources": sources, "tensors": tensors, "outputs": {str(out): recipe}}).values()
    assert result.plan.reflink


blocks = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(drawn=blocks, tail=st.integers(0, ALIGNMENT), step=st.integers(1, 9))
def test_shared_and_written_ranges_make_the_file(
    tmp_path: Path, drawn: list[tuple[int, int]], tail: int, step: int
) -> None:
    """Ranges of blocks to be shared with two files by turns, each after a gap; every third is refused."""
    shared, position = [], 0
    for gap, count in drawn:
        position += gap * ALIGNMENT
        if count:
            shared.append(Extent(position, position, count * ALIGNMENT))
        position += count * ALIGNMENT
    data = os.urandom(position + tail)
    sources = []
    for i in range(2):
        (tmp_path / f"source{i}").write_bytes(data)
        sources.append(SourceFile.at(tmp_path / f"source{i}"))
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, lambda count: count % 3 != 0)
        by_turns = {source: shared[i::2] for i, source in enumerate(sources)}
        target = DirectFile(tmp_path / "out", len(data), shared=by_turns)
        memory = memoryview(page_memory(step * ALIGNMENT))
        for start in range(0, len(data), len(memory)):
            used = min(len(memory), len(data) - start)
            memory[:used] = data[start : start + used]
            target.write(start, memory, used)
        assert target.shared_nbytes == disk.shared
        assert len(data) <= disk.shared + disk.written < len(data) + ALIGNMENT
        target.close()
    assert (tmp_path / "out").read_bytes() == data


nbytes = st.integers(1, 40).map(lambda count: 8 * count) | st.integers(1, 300)
file = st.tuples(st.integers(0, 40), st.lists(st.tuples(nbytes, st.booleans()), max_size=5))


@given(st.lists(file, max_size=3), st.integers(0, 100), st.sampled_from([1, 100]))
@example([(2, [(128, True)]), (1, [(128, True)])], 0, 1)  # two paddings that share as much
def test_the_padding_is_the_one_that_shares_most(
    files: list[tuple[int, list[tuple[int, bool]]]], eighths: int, least: int
) -> None:
    """With blocks of 64 bytes, against every padding and every block: tensors of any size from up to three files."""
    header_nbytes, extents, position, size = 8 * eighths, {}, 0, 0
    for i, (begin, tensors) in enumerate(files):
        own, offset = [], 8 * begin
        for nbytes, kept in tensors:
            if kept:
                own.append(Extent(offset, position, nbytes))
            position, offset = position + nbytes, offset + nbytes + (0 if kept else 24)
        extents[SourceFile(str(i), offset, 0)] = own
        size = position

    def shared(padding: int) -> int:
        total = 0
        for own in extents.values():
            places = {e.target_offset + at: e.source_offset + at for e in own for at in range(e.nbytes)}
            start = header_nbytes + padding
            run = 0
            for block in range(-(-start // 64) * 64, start + size + 1, 64):
                found = [places.get(block + at - start, -1) for at in range(64)]
                whole = found[0] % 64 == 0 and found == list(range(found[0], found[0] + 64))
                if whole and run and places[block - 64 - start] != found[0] - 64:
                    total, run = total + (run if run >= least else 0), 0
                if not whole:
                    total, run = total + (run if run >= least else 0), 0
                run += 64 if whole else 0
            total += run if run >= least else 0
        return total

    padding, found = fit_header(header_nbytes, extents, 64, least)
    gains = {p: shared(p) for p in range(0, 64, 8)}
    assert sum(e.nbytes for own in found.values() for e in own) == gains[padding] == max(gains.values())
    assert padding == min(p for p, gain in gains.items() if gain == gains[padding])
    for source, own in found.items():
        for begin, at, nbytes in own:
            assert begin % 64 == at % 64 == nbytes % 64 == 0
            inside = [e for e in extents[source] if e.target_offset < at + nbytes - header_nbytes - padding]
            assert any(e.source_offset - e.target_offset == begin - (at - header_nbytes - padding) for e in inside)
