"""Memory does not depend on the size of the model or of its largest tensor: proved under a hard limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weightops.formats.layout import Literal
from weightops.formats.safetensors import safetensors_layout
from weightops.spec import DType, TensorSpec

WORKERS = 1
LIMIT_NBYTES = (256 + 32 * WORKERS) << 20


def sparse(folder: Path, dtype: DType, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint of zeros that takes no disk."""
    folder.mkdir()
    layout = safetensors_layout([(n, TensorSpec(dtype, s)) for n, s in shapes.items()], {"format": "pt"})
    header = layout.pieces[0]
    assert isinstance(header, Literal)
    (folder / "model.safetensors").write_bytes(header.data)
    os.truncate(folder / "model.safetensors", layout.nbytes)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 1}))
    return folder


def run_limited(*arguments: str) -> None:
    """Run weightops with its writable memory (heap, stacks, private mappings) limited by the kernel."""
    done = subprocess.run(
        [sys.executable, "-m", "weightops", *arguments, "--workers", str(WORKERS), "--quiet"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_NBYTES, LIMIT_NBYTES)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


BIG = (1 << 15, 1 << 14)


@pytest.mark.parametrize("container", ["safetensors", "torch-1.12"])
def test_a_tensor_of_a_gigabyte_is_recovered_in_288_mib(tmp_path: Path, container: str) -> None:
    raw = sparse(tmp_path / "raw", DType.F16, {"w": BIG})
    diff = sparse(tmp_path / "diff", DType.F16, {"w": BIG})
    run_limited(
        "recover", "--raw", str(raw), "--diff", str(diff), "--out", str(tmp_path / "out"), "--format", container
    )
    shutil.rmtree(tmp_path / "out")


def peak_nbytes(*arguments: str) -> int:
    """The most anonymous memory that a Python process touched."""
    process = subprocess.Popen([sys.executable, *arguments])
    peak_kib = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak_kib = max(peak_kib, *(int(n) for n in re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        time.sleep(0.005)
    assert process.returncode == 0
    return peak_kib * 1024


def test_a_grown_vocabulary_is_averaged_in_little_more_than_torch_takes(tmp_path: Path) -> None:
    """The mean is the one operation that imports torch, which takes 150 MB itself, and twice that built for CUDA."""
    name = "model.embed_tokens.weight"
    raw = sparse(tmp_path / "raw", DType.F16, {name: (32_000, 8192)})
    diff = sparse(tmp_path / "diff", DType.F32, {name: (32_001, 8192)})
    arguments = ["--raw", str(raw), "--diff", str(diff), "--out", str(tmp_path / "out"), "--vocab", "mean"]
    peak = peak_nbytes("-m", "weightops", "recover", *arguments, "--workers", "1", "--quiet")
    assert peak - peak_nbytes("-c", "import time, torch; time.sleep(0.1)") < 96 << 20
    shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_a_model_larger_than_memory_is_recovered_in_288_mib(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    layers = memory // (1 << 32) + 1
    shapes = {f"layer.{i}": (1 << 16, 1 << 15) for i in range(layers)} | {"embed": (262_144, 16_384)}
    nbytes = sum(a * b * 2 for a, b in shapes.values())
    assert nbytes > memory
    if shutil.disk_usage(tmp_path).free < nbytes * 1.1:
        pytest.skip(f"needs {nbytes * 1.1:.0f} bytes of disk")
    raw = sparse(tmp_path / "raw", DType.F16, shapes)
    diff = sparse(tmp_path / "diff", DType.F16, shapes)
    run_limited("recover", "--raw", str(raw), "--diff", str(diff), "--out", str(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out")
