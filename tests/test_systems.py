"""The tests again, in a child that passes for another system or stands on another file system (see systems.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import systems

pytestmark = pytest.mark.skipif(bool(systems.installed), reason="this is such a child")

FOLDERS = ["tests/engine/test_staging.py", "tests/hostile/test_download.py", "tests/stores/transfer/test_places.py"]
HOLDERS = ["tests/engine/test_lock.py", "tests/stores/transfer/test_partial.py"]
KILLS = [
    "tests/crash/test_kill.py::test_killed_anywhere_the_same_command_ends_with_the_same_bytes"
    "[recover --raw raw --diff delta --overwrite-1]",
    "tests/stores/transfer/test_kills.py::"
    "test_killed_at_any_change_to_the_disk_it_ends_as_if_nothing_had_happened[5-update]",
]

QUICK = ["-k", "not never_lost"]


def run(system: str, tmp_path: Path, *arguments: str) -> int:
    """Run tests, given by paths from here; how many passed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--basetemp={tmp_path / 'tests'}",
            *arguments,
        ],
        cwd=Path(__file__).parent.parent,
        env={**environment, systems.VARIABLE: system},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])


@pytest.mark.parametrize(
    ("system", "files"),
    [
        pytest.param("plain", [*FOLDERS, *HOLDERS, *QUICK], marks=pytest.mark.slow),
        pytest.param("windows", [*FOLDERS, *HOLDERS, *KILLS], marks=pytest.mark.slow),
        pytest.param("folded", [*FOLDERS, *QUICK], marks=pytest.mark.slow),
        pytest.param("flat", [*FOLDERS, *QUICK], marks=pytest.mark.slow),
    ],
)
def test_files_locks_and_kills_on_other_systems(system: str, files: list[str], tmp_path: Path) -> None:
    assert run(system, tmp_path, *files) > 170


@pytest.mark.slow
@pytest.mark.parametrize("system", systems.SYSTEMS)
def test_everything_on_other_systems(system: str, tmp_path: Path) -> None:
    assert run(system, tmp_path, "-n", "2", "tests") > 4000


def test_a_child_really_lacks_what_its_system_does(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from weightops.io.direct import DirectFile
from weightops.io.platform.entries import rename
file = DirectFile(Path(sys.argv[1]) / "x", 4096)
try:
    (Path(sys.argv[1]) / "x").unlink()
    print("removed")
finally:
    file.abandon()
"""
    path = os.pathsep.join([str(systems.TESTS / "children"), *filter(None, [os.environ.get("PYTHONPATH")])])
    (tmp_path / "weightops").mkdir()
    (tmp_path / "weightops/program.py").write_text(code)
    for system, said in (("", "removed"), ("plain", "removed"), ("windows", "x is open")):
        environment = {**os.environ, systems.VARIABLE: system, "PYTHONPATH": path}
        command = [sys.executable, str(tmp_path / "weightops/program.py"), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert said in done.stdout + done.stderr
