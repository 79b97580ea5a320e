"""`make gpu` goes through on machines that lack what it needs, and says what."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


def test_a_bare_python_is_told_what_each_part_lacks(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "no torch"
    statuses = {part["part"]: part["status"] for part in found["parts"]}
    assert statuses["kernels"] == "skipped: this Python lacks torch, triton"
    assert "lacks torch, transformers" in statuses["models"]
    assert "## Kernels against float64" in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 3
    assert "--rehearse runs on the CPU what can run there" in capsys.readouterr().out


def test_times_of_a_cpu_are_not_taken(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rehearse", "--only", "table", "--out", str(tmp_path)]
    subprocess.run(command, capture_output=True, check=True)
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert part["status"].startswith("skipped: ")
