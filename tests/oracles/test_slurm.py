"""Jobs by Slurm's own controller and daemon, on this machine: docs/cluster/work.sbatch, as it stands."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import copy_inputs, make_with_outputs, outputs, write

import weightops
from weightops.errors import Unfinished

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "munged")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in PROGRAMS),
        reason="Slurm is not installed (`apt-get install slurm-wlm`)",
    ),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="Slurm's daemon wants to be root"),
]
SCRIPT = Path(__file__).parents[2] / "docs/cluster/work.sbatch"
PATIENCE_S = 400


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def running(*words: str, environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def until(question: str, environment: dict[str, str], answer: str) -> None:
    """Ask until the answer has these words; "" is for no answer at all."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        done = subprocess.run(question.split(), env=environment, capture_output=True, text=True, check=False)
        if not done.returncode and (answer in done.stdout if answer else not done.stdout.strip()):
            return
        assert time.monotonic() < give_up, f"{question}: {done.stdout}{done.stderr}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which its commands speak to a controller and a daemon of our own."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "bin").mkdir()
    (folder / "bin/weightops").write_text(f'#!/bin/bash\nexec {sys.executable} -m weightops "$@"\n')
    (folder / "bin/weightops").chmod(0o755)
    key, sock = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host = socket.gethostname()
    config = folder / "slurm.conf"
    config.write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={sock}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    path = f"{folder / 'bin'}:{os.environ['PATH']}:/usr/sbin"
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(config)}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={sock}"]
    munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"]
    with (
        running(*munged, environment=environment),
        running("slurmctld", "-D", "-f", str(config), environment=environment),
        running("slurmd", "-D", "-f", str(config), "-N", host, environment=environment),
    ):
        until("sinfo --noheader -o %t", environment, "idle")
        yield environment


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_with_outputs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def family(made: Path, tmp_path: Path) -> Path:
    return copy_inputs(made, tmp_path)


def submit(environment: dict[str, str], place: Path, array: str, script: Path = SCRIPT) -> str:
    line = ["sbatch", "--parsable", f"--array={array}", f"--output={place.parent}/%A_%a.out", str(script), str(place)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, cwd=place.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_array_makes_what_one_run_makes(made: Path, family: Path, slurm: dict[str, str]) -> None:
    place, count = write(family)
    number = submit(slurm, place, f"0-{count - 1}")
    until(f"squeue --noheader --jobs {number}", slurm, "")
    weightops.finish(place)
    assert outputs(family) == outputs(made)


def test_a_task_that_failed_is_named_and_submitted_again(made: Path, family: Path, slurm: dict[str, str]) -> None:
    place, count = write(family)
    group = place / "groups/00001.json"
    whole = group.read_bytes()
    group.write_bytes(whole[:-10])
    number = submit(slurm, place, f"0-{count - 1}")
    until(f"squeue --noheader --jobs {number}", slurm, "")
    group.write_bytes(whole)
    with pytest.raises(Unfinished, match="1 of 4 groups") as caught:
        weightops.finish(place)
    assert "sbatch --array=1`" in str(caught.value.hint)
    number = submit(slurm, place, ",".join(map(str, caught.value.groups)))
    until(f"squeue --noheader --jobs {number}", slurm, "")
    weightops.finish(place)
    assert outputs(family) == outputs(made)


def test_a_task_that_is_requeued_in_its_middle(made: Path, family: Path, slurm: dict[str, str]) -> None:
    """It is ended by Slurm, and done again; two minutes later, as Slurm has it."""
    place, count = write(family)
    slow = family / "slow.sbatch"
    slow.write_text(
        SCRIPT.read_text().replace("exec weightops", "[ -e begun ] || { touch begun; sleep 60; }\nexec weightops")
    )
    number = submit(slurm, place, "0", slow)
    give_up = time.monotonic() + PATIENCE_S
    while not (family / "begun").exists():
        assert time.monotonic() < give_up
        time.sleep(0.1)
    subprocess.run(["scontrol", "requeue", f"{number}_0"], env=slurm, check=True)
    subprocess.run(["scontrol", "update", f"jobid={number}_0", "starttime=now"], env=slurm, check=False)
    for group in range(1, count):
        weightops.work(place, group)
    until(f"squeue --noheader --jobs {number}", slurm, "")
    weightops.finish(place)
    assert outputs(family) == outputs(made)
