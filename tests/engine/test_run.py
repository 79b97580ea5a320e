"""The engine: the same bytes however it runs, nothing half-written whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import digests, state_dicts, write_checkpoint
from systems import needs

import weightops
from weightops.engine import digest, preflight, run, stream
from weightops.engine.control import Control
from weightops.errors import (
    CorruptInput,
    Differs,
    Interrupted,
    Locked,
    NoRoom,
    OutputExists,
    PlanDiffers,
    UsageError,
    WeightopsError,
)
from weightops.formats.containers import pack, pack_shared
from weightops.formats.folder import open_checkpoint
from weightops.plan import Plan, make_plan
from weightops.recipes.execute import Result


def state(seed: int, scale: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (300 * scale, 65), "b": (7,), "c": (), "d": (0, 3), "e": (64, 1024), "f": (1, 40_000)}
    return {n: torch.randn(s, generator=generator).half() for n, s in shapes.items()}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "raw", state(0), shards=2)
    write_checkpoint(tmp_path / "diff", state(1), shards=3)
    return tmp_path


def recover(folder: Path, out: str = "out", **options: object) -> Result:
    return weightops.recover(folder / "raw", folder / "diff", folder / out, max_shard_size="50KB", **options)


def set_block(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    for module in (stream, digest, run):
        monkeypatch.setattr(module, "BLOCK_NBYTES", nbytes)


@pytest.mark.parametrize("container", ["safetensors", "torch", "torch-1.12"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("block", [4096, 3 * 4096, 1 << 20])
def test_same_bytes_whatever_the_blocks_and_threads(
    pair: Path, monkeypatch: pytest.MonkeyPatch, container: str, workers: int, block: int
) -> None:
    recover(pair, "reference", format=container)
    set_block(monkeypatch, block)
    recover(pair, format=container, workers=workers)
    assert digests(pair / "out") == digests(pair / "reference")


def test_a_finished_output_is_refused_or_replaced_on_request(pair: Path) -> None:
    recover(pair)
    before = digests(pair / "out")
    with pytest.raises(OutputExists, match="out exists"):
        recover(pair)
    (pair / "out" / "stale").write_text("old")
    recover(pair, overwrite=True)
    assert digests(pair / "out") == before
    assert sorted(p.name for p in pair.iterdir()) == ["diff", "out", "raw"]


def test_an_empty_folder_is_a_place_to_write(pair: Path) -> None:
    (pair / "out").mkdir()
    recover(pair)
    assert (pair / "out" / "weightops-manifest.json").exists()


def test_dry_run_writes_nothing(pair: Path) -> None:
    before = digests(pair)
    result = recover(pair, dry_run=True)
    assert digests(pair) == before
    assert result.manifest is None
    written = recover(pair)
    assert result.plan.shard_nbytes == {s.name: (pair / "out" / s.name).stat().st_size for s in written.plan.shards}


def fail_after(monkeypatch: pytest.MonkeyPatch, name: str, count: int, error: int) -> None:
    """Let the call `os.<name>` fail from the `count`-th time on."""
    original: Callable[..., object] = getattr(os, name)
    calls = iter(range(10**9))

    def call(*args: object, **kwargs: object) -> object:
        if next(calls) >= count:
            raise OSError(error, os.strerror(error))
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("count", range(0, 14, 3))
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name)) for name in ("pwrite", "posix_fallocate", "fsync", "write")]
)
def test_a_full_disk_at_any_write_leaves_nothing_and_can_be_continued(
    pair: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    recover(pair, "reference")
    with monkeypatch.context() as patch:
        fail_after(patch, name, count, errno.ENOSPC)
        try:
            recover(pair, workers=1)
        except NoRoom as error:
            assert "disk is full" in str(error)  # noqa: PT017
            assert not (pair / "out").exists()
    if not (pair / "out").exists():
        recover(pair)
    assert digests(pair / "out") == digests(pair / "reference")


@needs("preadv")
def test_a_read_error_names_file_and_byte(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if len(buffers[0]) > 10_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(WeightopsError, match=r"\.safetensors: cannot be read at byte \d+ \(Input/output error\)"):
        recover(pair)
    assert not (pair / "out").exists()


def test_a_source_that_changes_while_it_is_read_is_noticed(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = next((pair / "raw").glob("*.safetensors"))
    original = stream.write_files

    def write_files(*args: object, **kwargs: object) -> object:
        os.utime(target, ns=(1, 1))
        return original(*args, **kwargs)

    monkeypatch.setattr(run, "write_files", write_files)
    with pytest.raises(CorruptInput, match="changed while it was being read"):
        recover(pair)
    assert not (pair / "out").exists()


def test_a_source_cut_short_after_opening_is_refused(pair: Path) -> None:
    plan = recover(pair, dry_run=True).plan
    target = max((pair / "raw").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    os.truncate(target, 1000)
    with pytest.raises(CorruptInput, match="changed while it was being read"):
        run.run(plan, pair / "out")


@pytest.mark.parametrize(
    ("out", "words"), [("raw", "inside one another"), ("raw/inner", "inside one another"), (".", "inside one another")]
)
def test_output_among_the_inputs_is_refused(pair: Path, out: str, words: str) -> None:
    before = digests(pair)
    with pytest.raises(UsageError, match=words):
        recover(pair, out, overwrite=True)
    assert digests(pair) == before


def test_too_little_disk_or_memory_is_refused_before_work(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "free_disk", lambda out: 1000)
        with pytest.raises(NoRoom, match="bytes of disk, 1000 are free"):
            recover(pair)
    monkeypatch.setattr(preflight, "available_memory", lambda: 1000)
    with pytest.raises(NoRoom, match="bytes of memory, 1000 are available"):
        recover(pair)
    assert not (pair / "out.partial").exists()


def test_a_file_that_another_run_renames_while_disk_is_counted_is_left_out(tmp_path: Path) -> None:
    for name in ("a.part", "b.part"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.part/data").symlink_to(tmp_path / "gone")  # listed, and not there when it is looked at
    (tmp_path / "b.part/data").write_bytes(b"\1" * 8192)
    assert preflight.taken_disk(tmp_path, "*/data") == 8192
    assert preflight.taken_disk(tmp_path / "gone", "*/data") == 0


class StopAfter(Control):
    """Cancels itself after some blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self._left = blocks

    def check(self) -> None:
        self._left -= 1
        if self._left < 0:
            self.cancel(15)
        super().check()


def interrupt(folder: Path, blocks: int) -> None:
    with pytest.raises(Interrupted, match="interrupted") as caught:
        recover(folder, workers=1, control=StopAfter(blocks))
    assert caught.value.exit_code == 143


def test_an_interrupted_run_is_continued(pair: Path) -> None:
    recover(pair, "reference")
    interrupt(pair, 4)
    kept = recover(pair).resumed
    assert 0 < len(kept) < 3
    assert digests(pair / "out") == digests(pair / "reference")


def test_a_damaged_committed_shard_is_written_again(pair: Path) -> None:
    recover(pair, "reference")
    interrupt(pair, 4)
    shard = min((pair / "out.partial/output").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert shard.name not in recover(pair).resumed
    assert digests(pair / "out") == digests(pair / "reference")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "torch"}, "container was"),
        ({"dtype": "float32"}, r"recipe\.tensors\.result\.recover\.dtype was null, now"),
    ],
)
def test_another_plan_does_not_continue_a_partial_output(pair: Path, options: dict[str, str], words: str) -> None:
    interrupt(pair, 4)
    with pytest.raises(PlanDiffers, match=words):
        recover(pair, **options)
    recover(pair, restart=True, **options)
    assert (pair / "out").exists()


def test_a_changed_source_does_not_continue_a_partial_output(pair: Path) -> None:
    interrupt(pair, 4)
    write_checkpoint(pair / "diff", state(7), shards=3)
    with pytest.raises(PlanDiffers, match="mtime_ns was"):
        recover(pair)


def test_sources_may_move_before_a_run_is_continued(pair: Path) -> None:
    recover(pair, "reference")
    interrupt(pair, 4)
    (pair / "moved").mkdir()
    (pair / "raw").rename(pair / "moved" / "raw")
    moved = weightops.recover(pair / "moved" / "raw", pair / "diff", pair / "out", max_shard_size="50KB")
    assert moved.resumed
    assert digests(pair / "out") == digests(pair / "reference")


def test_two_runs_at_once_do_not_meet(pair: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Waits(Control):
        def check(self) -> None:
            entered.set()
            leave.wait(30)

    first = threading.Thread(target=lambda: recover(pair, control=Waits()))
    first.start()
    assert entered.wait(30)
    with pytest.raises(Locked, match=f"process {os.getpid()} on"):
        recover(pair)
    leave.set()
    first.join()
    assert (pair / "out" / "weightops-manifest.json").exists()


def test_expectations_are_met_or_nothing_is_published(pair: Path) -> None:
    recover(pair, "reference", digest=["sha256"])
    reference = pair / "reference" / "weightops-manifest.json"
    recover(pair, "again", expect=reference)
    wrong = json.loads(reference.read_bytes())["files"]["model-00001-of-00003.safetensors"]["digests"]["sha256"]
    listing = pair / "list.sha256"
    listing.write_text(f"{wrong[::-1]}  model-00001-of-00003.safetensors\n")
    with pytest.raises(Differs, match=r"model-00001-of-00003\.safetensors has sha256 .* nothing was published"):
        recover(pair, expect=listing)
    assert not (pair / "out").exists()
    assert not (pair / "out.partial").exists()
    listing.write_text(f"{wrong}  pytorch_model.bin\n")
    with pytest.raises(UsageError, match=r"lists pytorch_model\.bin, which would not be written"):
        recover(pair, expect=listing)


@pytest.mark.parametrize(
    ("edit", "said"),
    [({"drop": "c"}, "the tensor c is not in it"), ({"rename": {"^b$": "z"}}, "the tensor b is not in it")],
)
def test_an_expected_manifest_must_be_of_the_same_tensors(pair: Path, edit: dict[str, Any], said: str) -> None:
    weightops.shard(pair / "raw", pair / "other", **edit)
    with pytest.raises(UsageError, match=said):
        recover(pair, expect=pair / "other/weightops-manifest.json")
    with pytest.raises(UsageError, match=r"the tensor [bc] would not be written"):
        weightops.shard(pair / "raw", pair / "out", drop=["b", "c"], expect=pair / "other/weightops-manifest.json")


def test_where_a_file_system_is_mounted_nothing_can_be_put_in_its_place(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path.name == "out")
    with pytest.raises(OutputExists, match="out is where a file system is mounted"):
        recover(pair, overwrite=True)


@pytest.mark.parametrize(("container", "times"), [("torch", 1), ("torch-1.12", 2), ("safetensors", 2)])
def test_the_index_counts_tied_tensors_as_often_as_its_writer_does(tmp_path: Path, container: str, times: int) -> None:
    """torch stores them once, and 4.28 counted them twice even so; safetensors stores both."""
    tensor, other = torch.randn(40, 8), torch.randn(50, 8)
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"head": tensor, "embed": tensor, "other": other}, source / "pytorch_model.bin")
    weightops.shard(source, tmp_path / "out", format=container, max_shard_size=1500)
    (index,) = (tmp_path / "out").glob("*.index.json")
    assert json.loads(index.read_bytes())["metadata"]["total_size"] == times * tensor.nbytes + other.nbytes


def test_plans_survive_json(pair: Path) -> None:
    plan = recover(pair, dry_run=True).plan
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.fingerprint == plan.fingerprint
    assert again.shards == plan.shards
    outcome = run.run(again, pair / "out")
    assert outcome.manifest.content_id == recover(pair, "direct").manifest.content_id


def test_file_mode_follows_the_umask(pair: Path) -> None:
    previous = os.umask(0o027)
    try:
        recover(pair)
    finally:
        os.umask(previous)
    modes = {path.stat().st_mode & 0o777 for path in (pair / "out").iterdir()}
    assert modes == {0o640}


def test_shards_are_packed_as_huggingface_hub_does(tmp_path: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = {"a": 10, "big": 400, "b": 90, "c": 95, "d": 5, "e": 1, "last": 101}
    tensors = {n: torch.zeros(size, dtype=torch.uint8) for n, size in sizes.items()}
    write_checkpoint(tmp_path, tensors)
    lazy = open_checkpoint(tmp_path).tensors
    ordered = {n: lazy[n] for n in sizes}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=100)
    expected = list(split.filename_to_tensors.values())
    assert pack(ordered, 100) == expected
    assert pack_shared(ordered, 100) == expected


def test_source_grouping_is_kept(pair: Path) -> None:
    result = weightops.shard(pair / "diff", pair / "out", max_shard_size="source")
    grouped = {frozenset(s.tensors) for s in result.plan.shards}
    assert grouped == {frozenset(n for n in state(1) if list(state(1)).index(n) % 3 == i) for i in range(3)}


def test_expected_total_size_in_the_index(pair: Path) -> None:
    plan = make_plan(open_checkpoint(pair / "raw"), {}, max_shard_nbytes=50_000)
    index = json.loads(plan.index() or b"")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state(0).values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in state(0).values())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(tensors=state_dicts(), block=st.sampled_from([4096, 1 << 22]))
def test_files_have_the_bytes_of_the_reference_writers(tmp_path: Path, tensors: dict[str, Any], block: int) -> None:
    """safetensors against save_file, torch against torch.save, through reader, plan and engine."""
    shutil.rmtree(tmp_path, ignore_errors=True)
    write_checkpoint(tmp_path / "model", tensors)
    weightops.shard(tmp_path / "model", tmp_path / "out")
    written, reference = (tmp_path / name / "model.safetensors" for name in ("out", "model"))
    assert written.read_bytes() == reference.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        set_block(patch, block)
        weightops.shard(tmp_path / "model", tmp_path / "torch", format="torch")
    ordered = {n: tensors[n] for n in open_checkpoint(tmp_path / "model")}
    torch.save(ordered, tmp_path / "pytorch_model.bin")
    assert (tmp_path / "torch" / "pytorch_model.bin").read_bytes() == (tmp_path / "pytorch_model.bin").read_bytes()


@pytest.mark.parametrize("container", ["torch", "torch-1.12", "safetensors"])
def test_an_index_counts_shared_tensors_as_they_are_stored(tmp_path: Path, container: str) -> None:
    """What two names share is in a torch file once, and is counted once; transformers 4.28 counted it twice."""
    shared = torch.arange(1000.0)
    torch.save({"a": shared, "b": torch.ones(900), "c": shared}, tmp_path / "pytorch_model.bin")
    out = weightops.shard(tmp_path, tmp_path.parent / "out", format=container, max_shard_size="5KB", overwrite=True).out
    (index,) = out.glob("*.index.json")
    total = json.loads(index.read_bytes())["metadata"]["total_size"]
    assert total == (4 * 1900 if container == "torch" else 4 * 2900)


def test_a_plan_is_the_same_whatever_the_order_of_its_settings(pair: Path) -> None:
    plan = recover(pair, dry_run=True).plan
    turned = replace(plan, recipe=dict(reversed(list(plan.recipe.items()))))
    assert list(turned.recipe) != list(plan.recipe)
    assert turned.fingerprint == plan.fingerprint
