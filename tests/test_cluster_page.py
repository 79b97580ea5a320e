"""The page about clusters: its commands and the files to copy, as far as a machine without a cluster goes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import make_family
from support import digests

import weightops
from weightops.cli.main import run

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "cluster.md").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the page's models, `./llama` and `./delta`, and what one run makes of them."""
    make_family(tmp_path)
    (tmp_path / "raw").rename(tmp_path / "llama")
    shutil.rmtree(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    weightops.recover("./llama", "./delta", "whole")
    return tmp_path


def lines(title: str) -> list[str]:
    """Commands of a part of the page."""
    part = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^    (.*)", part, re.MULTILINE)


def test_the_three_commands(folder: Path) -> None:
    recover, first, _, finish = lines("Three commands")
    assert run(shlex.split(recover)[1:]) == 0
    groups = len(list((folder / "tuned-job/groups").iterdir()))
    for number in range(groups):
        assert run(shlex.split(first.replace("--group 0", f"--group {number}"))[1:]) == 0
    assert run(shlex.split(finish)[1:]) == 0
    assert digests(folder / "tuned") == digests(folder / "whole")


def test_slurm_with_a_shell_that_submits_by_running(folder: Path) -> None:
    """What `sbatch` would do is done at once, a task after the other."""
    (folder / "bin").mkdir()
    script = DOCS / "cluster/work.sbatch"
    weightops_itself = f'exec {shlex.quote(sys.executable)} -m weightops "$@"\n'
    sbatch = f'for task in $(seq 0 "${{1##*-}}"); do SLURM_ARRAY_TASK_ID=$task bash {script} "$3"; done\n'
    jq = f"exec {shlex.quote(sys.executable)} -c \"import json, sys; print(json.load(sys.stdin)['groups'])\"\n"
    for name, text in {"weightops": weightops_itself, "sbatch": sbatch, "jq": jq}.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-e", "-c", "\n".join(lines("Slurm"))], check=True, env=environment)
    assert digests(folder / "tuned") == digests(folder / "whole")


def test_the_pods_of_kubernetes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = yaml.safe_load((DOCS / "cluster/kubernetes.yaml").read_text())
    assert document["spec"]["completionMode"] == "Indexed"
    (container,) = document["spec"]["template"]["spec"]["containers"]
    assert run(shlex.split(lines("Three commands")[0])[1:]) == 0
    for number in range(len(list((folder / "tuned-job/groups").iterdir()))):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(number))
        assert run([word.replace("/models", str(folder)) for word in container["command"][1:]]) == 0
    assert run(["finish", "tuned-job"]) == 0
    assert digests(folder / "tuned") == digests(folder / "whole")
    codes = document["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    assert {1, 3, 16, 130, 143}.isdisjoint(codes)  # these may be over at the next attempt


def test_the_lines_for_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that does each task when it is asked for."""

    def remote(function: Callable[..., Any]) -> Any:
        return types.SimpleNamespace(remote=lambda *words: lambda: function(*words))

    ray = types.SimpleNamespace(remote=remote, get=lambda tasks: [task() for task in tasks])
    monkeypatch.setitem(sys.modules, "ray", ray)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert digests(folder / "tuned") == digests(folder / "whole")


def test_the_number_of_groups_is_in_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*shlex.split(lines("Three commands")[0])[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == len(list((folder / "tuned-job/groups").iterdir()))
