"""Tools that want an environment of their own, which `make` sets up, and scripts of tests/oracles that run there."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def environment(name: str) -> Path:
    """The folder that `make NAME` makes."""
    return HERE.parent / f".venv-{name}"


def run_script(environment: Path, script: str, *arguments: object) -> str:
    """What a script prints in an environment; skips where that is missing."""
    if not (environment / ".ready").exists():
        target = environment.name.removeprefix(".venv-").removesuffix("-old")
        pytest.skip(f"{environment.name} is missing: `make {target}` makes it")
    command = [environment / "bin/python", HERE / "oracles" / script, *map(str, arguments)]
    settings = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # In a folder of its own: gptqmodel leaves logs where it runs.
    with tempfile.TemporaryDirectory() as cwd:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **settings}
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
