"""Whoever does the groups of a job: the same files, failures as they are, and a second run that goes on."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
from jobs import copy_inputs, make_with_outputs, outputs, write
from systems import needs_itself

import weightops
from weightops.cli.main import run
from weightops.engine.control import Control, Silent
from weightops.engine.job import dask
from weightops.engine.job.dask import Dask
from weightops.engine.job.drive import Executor, Threads
from weightops.engine.job.place import OpenJob
from weightops.errors import IncompatibleInputs, Interrupted, NetworkFailed, NoRoom, UsageError, WeightopsError

HAS_DASK = importlib.util.find_spec("distributed") is not None
needs_dask = pytest.mark.skipif(not HAS_DASK, reason="distributed is not installed")


class Array:
    """A process for each group, as Slurm and Kubernetes make them."""

    needs_job: ClassVar[bool] = True

    def do(self, job: OpenJob, groups: Sequence[int], control: Control) -> None:
        def one(number: int) -> None:
            control.check()
            line = [sys.executable, "-m", "weightops", "work", job.place, "--quiet"]
            done = subprocess.run(
                line,
                env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                kinds = {1: IncompatibleInputs}
                raise kinds.get(done.returncode, WeightopsError)(done.stderr)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, groups))


@contextmanager
def two_processes(memory_limit: str | None = None) -> Iterator[str]:
    """The address of a Dask cluster."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=memory_limit or "auto",
        silence_logs=50,
    ) as made:
        yield made.scheduler_address


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with two_processes() as address:
        yield address


@pytest.fixture
def mortal_cluster() -> Iterator[str]:
    """One whose workers die, so that no other test has it."""
    with two_processes() as address:
        yield address


EXECUTORS = ["threads", "array", pytest.param("dask", marks=needs_dask)]
FAST = ["threads", pytest.param("array", marks=pytest.mark.slow), pytest.param("dask", marks=needs_dask)]


@pytest.fixture
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "dask":
        return Dask(request.getfixturevalue("cluster"))
    return Threads(2) if request.param == "threads" else Array()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_with_outputs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def family(made: Path, tmp_path: Path) -> Path:
    """The inputs alone."""
    return copy_inputs(made, tmp_path)


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
def test_the_files_are_those_of_one_run(made: Path, family: Path, executor: Executor) -> None:
    weightops.run(family / "recipe.yaml", job=family / "job", executor=executor)
    assert outputs(family) == outputs(made)
    assert not list(family.glob("*.partial"))


@pytest.mark.parametrize("executor", FAST, indirect=True)
def test_a_failure_is_what_it_was_and_a_second_run_goes_on(made: Path, family: Path, executor: Executor) -> None:
    """Nothing has its name, and what was done is not done again."""
    file = sorted((family / "raw").glob("*.safetensors"))[0]
    whole = file.read_bytes()
    place, _ = write(family)
    status = file.stat()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # what only reading it tells
    with pytest.raises(IncompatibleInputs, match="delta"):
        weightops.run(family / "recipe.yaml", job=place, executor=executor)
    assert not (family / "one").exists()
    file.write_bytes(whole)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    done = {path.name: path.stat().st_mtime_ns for path in (place / "records").glob("*.json")}
    weightops.run(family / "recipe.yaml", job=place, executor=executor)
    assert outputs(family) == outputs(made)
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in (place / "records").glob("*.json")}.items()


@pytest.mark.parametrize("executor", FAST, indirect=True)
def test_one_that_is_stopped_goes_on_later(made: Path, family: Path, executor: Executor) -> None:
    control = Control()
    place, _ = write(family)
    control.cancel(signal.SIGTERM + 128)
    with pytest.raises(Interrupted, match="interrupted"):
        weightops.run(family / "recipe.yaml", job=place, executor=executor, control=control)
    assert not (family / "one").exists()
    weightops.run(family / "recipe.yaml", job=place, executor=executor)
    assert outputs(family) == outputs(made)


@needs_dask
def test_what_dask_workers_do_is_told(family: Path, cluster: str) -> None:
    class Told(Silent):
        nbytes, files = 0, ()

        def advance(self, nbytes: int, name: str = "") -> None:
            self.nbytes += nbytes

        def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
            self.files = (*self.files, name)

    told = Told()
    results = weightops.run(
        family / "recipe.yaml", job=family / "job", executor=f"dask:{cluster}", control=Control(told)
    )
    shards = [shard.name for result in results.values() for shard in result.plan.shards]
    assert sorted(told.files) == sorted(shards)
    assert told.nbytes >= sum(result.plan.total_nbytes for result in results.values())


@needs_dask
def test_a_cluster_that_is_not_there(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="find what to do in files"):
        weightops.run(family / "recipe.yaml", executor="dask:tcp://127.0.0.1:9")
    with pytest.raises(NetworkFailed, match="no Dask cluster answers at nowhere"):
        weightops.run(family / "recipe.yaml", job=family / "job", executor="dask:nowhere")
    assert run(["run", str(family / "recipe.yaml"), "--executor", "ray"]) == 2
    assert "there are threads and dask:ADDRESS" in capsys.readouterr().err


@needs_dask
def test_a_cluster_without_workers_is_not_waited_for(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    monkeypatch.setattr(dask, "_WORKERS_S", 0.2)
    with (
        distributed.LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as empty,
        pytest.raises(NetworkFailed, match=r"has had no worker for 0\.2 s"),
    ):
        weightops.run(family / "recipe.yaml", job=family / "job", executor=f"dask:{empty.scheduler_address}")


def die_in_the_first_group(place: str, number: int, roots: tuple[str, ...], progress: Silent) -> None:
    """A worker that is killed in mid-shard, the first time that somebody does group 0."""
    from weightops.engine.job.work import work

    mark = Path(place, "..", "died")
    if number == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    work(place, number, Control(progress), roots=roots)


def die_always(place: str, number: int, roots: tuple[str, ...], progress: Silent) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@needs_dask
@needs_itself("fork")
@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_group_alone(made: Path, family: Path, mortal_cluster: str) -> None:
    weightops.run(family / "recipe.yaml", job=family / "job", executor=Dask(mortal_cluster, die_in_the_first_group))
    assert (family / "died").exists()
    assert outputs(family) == outputs(made)


@needs_dask
@needs_itself("fork")
@pytest.mark.slow
def test_a_group_that_workers_die_of_is_named(made: Path, family: Path, mortal_cluster: str) -> None:
    with pytest.raises(NoRoom, match=r"the workers that had it died, whose memory limit is \d+ bytes"):
        weightops.run(family / "recipe.yaml", job=family / "job", executor=Dask(mortal_cluster, die_always))
    weightops.run(family / "recipe.yaml", job=family / "job", executor="threads")
    assert outputs(family) == outputs(made)


def eat_in_the_first_group(place: str, number: int, roots: tuple[str, ...], progress: Silent) -> None:
    """A group that needs more memory than a worker may have."""
    from weightops.engine.job.work import work

    eaten = []
    while number == 0:
        eaten.append(b"x" * (16 << 20))
        time.sleep(0.02)
    work(place, number, Control(progress), roots=roots)


@needs_dask
@needs_itself("fork")
@pytest.mark.slow
def test_a_group_that_needs_more_than_workers_may_have_is_named(made: Path, family: Path) -> None:
    """Dask's nanny ends them at 95 % of their limit."""
    with (
        two_processes("600MiB") as address,
        pytest.raises(NoRoom, match=r"group 0: the workers .* limit is 629145600 b"),
    ):
        weightops.run(family / "recipe.yaml", job=family / "job", executor=Dask(address, eat_in_the_first_group))
    weightops.run(family / "recipe.yaml", job=family / "job", executor="threads")
    assert outputs(family) == outputs(made)


def wait_in_the_first_group(place: str, number: int, roots: tuple[str, ...], progress: Silent) -> None:
    from weightops.engine.job.work import work

    mark = Path(place, "..", "frozen")
    if number == 0 and not mark.exists():
        mark.write_text(str(os.getpid()))
        time.sleep(2)
    work(place, number, Control(progress), roots=roots)


@needs_dask
@needs_itself("fork")
@pytest.mark.slow
def test_a_worker_that_freezes_is_thawed_and_harms_nothing(made: Path, family: Path, mortal_cluster: str) -> None:
    """Its group is done by another meanwhile, and all is published; what it then does is not wanted."""
    mark = family / "frozen"

    def freeze() -> None:
        while not mark.exists() or not mark.read_text():
            assert time.monotonic() < give_up, "no worker has begun"
            time.sleep(0.01)
        os.kill(int(mark.read_text()), signal.SIGSTOP)

    give_up = time.monotonic() + 120

    freezing = threading.Thread(target=freeze)
    place, count = write(family)
    freezing.start()
    driver = threading.Thread(
        target=lambda: weightops.run(
            family / "recipe.yaml", job=place, executor=Dask(mortal_cluster, wait_in_the_first_group)
        )
    )
    driver.start()
    freezing.join()
    try:
        for number in range(count):
            weightops.work(place, number)
        weightops.finish(place)
        assert outputs(family) == outputs(made)
    finally:
        os.kill(int(mark.read_text()), signal.SIGCONT)
    driver.join()
    assert outputs(family) == outputs(made)
    assert not list(family.glob("*.partial"))
