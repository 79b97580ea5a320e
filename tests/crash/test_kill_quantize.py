"""kill -9 while a model is quantised, then the same command: the same bytes as undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import save_tiny, text

COMMAND = "import sys; from weightops.cli.main import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    save_tiny(folder / "model", "llama", num_hidden_layers=5)
    (folder / "text.txt").write_text(text(300))
    return folder


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    options = ["--group-size", "32", "--samples", "40", "--seq-len", "64", "--act-order", "--quiet"]
    data = ["--calibration", str(folder / "text.txt")]
    arguments = ["quantize", str(folder / "model"), "--out", str(out), *options, *data]
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})


def kept(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "weightops-manifest.json"}


def test_killed_at_several_blocks_it_ends_with_the_same_bytes(folder: Path) -> None:
    whole, out = folder / "whole", folder / "out"
    assert start(folder, whole).wait() == 0
    for block in (0, 2):
        process = start(folder, out)
        waited_for = folder / f"out.blocks/block-{block:05d}.safetensors"
        while not waited_for.exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    process = start(folder, out)
    assert process.wait() == 0
    assert kept(out) == kept(whole)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out", "text.txt", "whole"]
