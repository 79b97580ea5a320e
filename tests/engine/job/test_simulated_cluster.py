"""Jobs on clusters where everything goes wrong, by the scripts of seeds: see `clusters`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cluster_stores import Objects, installed
from clusters import Cluster, Died, Machine
from support import digests, write_checkpoint
from systems import needs_itself

import weightops
from weightops.engine.control import Control
from weightops.engine.job.drive import drive
from weightops.engine.job.finish import finish
from weightops.engine.job.write import Wanted, write_job
from weightops.errors import WeightopsError
from weightops.formats.proofs import manifest
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


class Place:
    """A folder where the output goes, which may be there before; what is seen of it at every moment."""

    def __init__(self, made: Made, folder: Path, *, is_replaced: bool) -> None:
        self.out, self.job, self.is_replaced = str(folder / "out"), str(folder / "job"), is_replaced
        self._path, self._whole = folder / "out", made.whole
        if is_replaced:
            shutil.copytree(made.old, self._path)
        self._before = digests(self._path) if is_replaced else None

    def is_whole(self) -> bool:
        """Whether the new output is there: if not, the old one is, or none."""
        if not self._path.exists():
            assert self._before is None
            return False
        names = {path.name for path in self._path.iterdir()}
        found = digests(self._path) if names != (self._before or {}).keys() else self._before
        assert found in (self._whole, self._before)
        return found == self._whole

    def check_end(self) -> None:
        assert not self._path.with_name("out.partial").exists()


class BucketPlace:
    """A folder in a bucket: an output as soon as it has a manifest, and all else is there then."""

    out, job, is_replaced = "s3://bucket/out", "s3://bucket/job", False

    def __init__(self, made: Made, everything: Objects) -> None:
        self._objects, self._whole = everything.whole, made.whole

    def is_whole(self) -> bool:
        if f"out/{manifest.NAME}" not in self._objects:
            return False
        found = {k[4:]: hashlib.sha256(v).hexdigest() for k, v in self._objects.items() if k.startswith("out/")}
        assert self._whole.items() <= found.items()
        return True

    def check_end(self) -> None:
        assert {key[4:] for key in self._objects if key.startswith("out/")} == self._whole.keys()


def simulate(made: Made, folder: Path, seed: int) -> None:
    """A history: a process writes the job, has 64 nodes do it and finishes it; two others try to finish it as well.

    Each of them dies now and then, fails, and begins anew, and so do the nodes. By turns the output is new, replaces
    another one, and goes to a bucket.
    """
    cluster, everything = Cluster(seed), Objects()
    place = BucketPlace(made, everything) if seed % 3 == 2 else Place(made, folder, is_replaced=seed % 3 == 1)
    was_whole = False

    def look() -> None:
        nonlocal was_whole
        was_whole = was_whole or place.is_whole()

    def until_done(task: Callable[[], object]) -> None:
        while True:
            try:
                cluster.as_machine(Machine(), task)
                return
            except (Died, WeightopsError):
                cluster.clock.sleep(20)

    def drive_it() -> None:
        opened = write_job(place.job, [Wanted(place.out, made.plan, overwrite=place.is_replaced)], Control())
        drive(opened, cluster, Control())
        finish(place.job, Control())

    cluster.clock.watch = look
    with installed(cluster, everything):
        cluster.clock.spawn(lambda: until_done(drive_it))
        for _ in range(2):
            cluster.clock.spawn(lambda: until_done(lambda: finish(place.job, Control())))
        cluster.clock.run()
    assert was_whole
    assert place.is_whole()
    place.check_end()
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
