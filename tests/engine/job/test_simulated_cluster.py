"""Jobs on clusters where everything goes wrong, by the scripts of seeds: see `clusters`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from clusters import Cluster, Died, Machine
from support import digests, write_checkpoint
from systems import needs_itself

import weightops
from weightops.engine.control import Control
from weightops.engine.job.drive import drive
from weightops.engine.job.finish import finish
from weightops.engine.job.write import Wanted, write_job
from weightops.errors import WeightopsError
from weightops.plan import Plan

SHARDS, TENSOR_NBYTES = 70, 2048
QUICK, ALL, PORTION = 3, 1000, 50
pytestmark = needs_itself("fork")  # machines that die leave files open, which others have to remove


@dataclass(frozen=True)
class Made:
    """A plan, what a run that nothing disturbs makes of it, and what may have its place before."""

    plan: Plan
    whole: dict[str, str]
    old: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of an original that is all holes, and a compressed delta."""
    folder = tmp_path_factory.mktemp("made")
    write_holes(folder / "raw")
    tuned = {f"layers.{i}.weight": torch.full((32, 32), i).half() for i in range(SHARDS)}
    write_checkpoint(folder / "tuned", tuned)
    weightops.diff(folder / "raw", folder / "tuned", folder / "delta", compress=True)
    result = weightops.recover(folder / "raw", folder / "delta", folder / "out", max_shard_size=TENSOR_NBYTES)
    assert len(result.plan.shards) == SHARDS
    write_checkpoint(folder / "old", {"old": torch.zeros(3)})
    return Made(result.plan, digests(folder / "out"), folder / "old")


def write_holes(folder: Path) -> None:
    """A checkpoint of a header and zeros that take no disk."""
    folder.mkdir()
    header = {
        f"layers.{i}.weight": {
            "dtype": "F16",
            "shape": [32, 32],
            "data_offsets": [TENSOR_NBYTES * i, TENSOR_NBYTES * (i + 1)],
        }
        for i in range(SHARDS)
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + TENSOR_NBYTES * SHARDS)
    (folder / "config.json").write_text("{}")


def simulate(made: Made, folder: Path, seed: int) -> None:
    """A history: a process writes the job, has 64 nodes do it and finishes it; two others try to finish it as well.

    Each of them dies now and then, fails, and begins anew, and so do the nodes.
    """
    cluster, job, out = Cluster(seed), str(folder / "job"), folder / "out"
    is_replaced, is_whole = seed % 3 == 0, False
    if is_replaced:
        shutil.copytree(made.old, out)
    old = sorted(path.name for path in made.old.iterdir())

    def look() -> None:
        nonlocal is_whole
        if not is_whole and not (is_replaced and sorted(path.name for path in out.iterdir()) == old):
            is_whole = out.exists()
            assert not is_whole or digests(out) == made.whole

    def until_done(task: Callable[[], object]) -> None:
        while True:
            try:
                cluster.as_machine(Machine(), task)
                return
            except (Died, WeightopsError):
                cluster.clock.sleep(20)

    def drive_it() -> None:
        opened = write_job(job, [Wanted(str(out), made.plan, overwrite=is_replaced)], Control())
        drive(opened, cluster, Control())
        finish(job, Control())

    cluster.clock.watch = look
    with cluster.installed():
        cluster.clock.spawn(lambda: until_done(drive_it))
        for _ in range(2):
            cluster.clock.spawn(lambda: until_done(lambda: finish(job, Control())))
        cluster.clock.run()
    assert is_whole
    assert digests(out) == made.whole
    assert not (folder / "out.partial").exists()
    assert cluster.commits.keys() == {shard.name for shard in made.plan.shards}, "no work is lost"
    assert max(cluster.commits.values()) <= 2, "none is done three times"
    assert cluster.commits.total() - SHARDS <= len(cluster.hit), "nor twice without a reason"


@pytest.mark.parametrize("seed", range(QUICK))
def test_whatever_goes_wrong_the_output_is_old_or_absent_until_it_is_whole(
    made: Made, tmp_path: Path, seed: int
) -> None:
    simulate(made, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, ALL, PORTION))
def test_and_so_it_is_by_a_thousand_scripts(made: Made, tmp_path: Path, first: int) -> None:
    for seed in range(first, min(first + PORTION, ALL)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        simulate(made, folder, seed)
        shutil.rmtree(folder)
