"""Cores, memory and processes, asked for in every way there is."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import psutil
import pytest
from systems import on

from weightops.io.owner import Owner
from weightops.io.platform import machine as here


@pytest.fixture(params=["here", "plain", "windows"])
def machine(request: pytest.FixtureRequest) -> ModuleType:
    return here if request.param == "here" else on(request.param, "machine")


def test_a_process_is_known_by_its_number_and_its_start(machine: ModuleType) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        found = machine.started(process.pid)
        assert found is not None
        assert found == machine.started(process.pid) != machine.started(1)
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        assert machine.started(process.pid) is None  # dead, though nobody has asked after it yet
        process.wait()
    assert machine.started(process.pid) is None
    assert machine.started(2**31 - 1) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="whose a process is matters on POSIX")
def test_a_process_that_may_not_be_looked_at_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As others' are hidden by the mount option hidepid of /proc."""
    looked, place = here._proc, Owner.here().place
    monkeypatch.setattr(here, "_proc", lambda name: None if name == "12345678/stat" else looked(name))

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    assert here.started(12_345_678) is None
    assert Owner(place, 12_345_678, 5).is_alive() is False
    monkeypatch.setattr(os, "kill", kill)
    assert here.started(12_345_678) == here.HIDDEN
    assert Owner(place, 12_345_678, 5).is_alive() is True


def test_memory_is_what_the_machine_has_at_most(machine: ModuleType) -> None:
    assert 1 << 20 < machine.available_memory() <= psutil.virtual_memory().total
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="resource limits are POSIX'")
def test_its_own_limit_counts_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (12_345_678, resource.RLIM_INFINITY))
    assert on("plain", "machine").available_memory() == 12_345_678
    assert on("windows", "machine").available_memory() > 12_345_678


def test_memory_begins_at_a_page(machine: ModuleType) -> None:
    import numpy as np

    memory = machine.page_memory(8192)
    assert np.frombuffer(memory, np.uint8).ctypes.data % 4096 == 0
    memory[:4] = b"data"
    machine.release_freed()
    assert memory[:5] == b"data\0"


def test_names_of_this_boot_and_namespace_are_empty_where_there_are_none() -> None:
    assert on("plain", "machine").boot_id() == on("windows", "machine").pid_namespace() == ""
