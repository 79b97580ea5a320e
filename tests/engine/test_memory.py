"""Memory does not depend on the size of the model or of its largest tensor: proved under a hard limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from systems import needs_itself

from weightops.formats.layout import Literal
from weightops.formats.safetensors import safetensors_layout
from weightops.spec import DType, TensorSpec

resource = pytest.importorskip("resource")
pytestmark = needs_itself("/proc")

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


BIG = (1 << 14, 1 << 14)


@pytest.mark.parametrize("container", ["safetensors", pytest.param("torch-1.12", marks=pytest.mark.slow)])
def test_a_tensor_of_half_a_gigabyte_is_recovered_in_288_mib(tmp_path: Path, container: str) -> None:
    raw = sparse(tmp_path / "raw", DType.F16, {"w": BIG})
    diff = sparse(tmp_path / "diff", DType.F16, {"w": BIG})
    run_limited(
        "recover", "--raw", str(raw), "--diff", str(diff), "--out", str(tmp_path / "out"), "--format", container
    )
    shutil.rmtree(tmp_path / "out")


def test_tensors_of_half_a_gigabyte_are_compared_in_288_mib(tmp_path: Path) -> None:
    """Also where every number is another, and the rank of the change is looked for."""
    shapes = {"model.embed_tokens.weight": BIG, "model.layers.0.self_attn.q_proj.weight": (1 << 13, 1 << 13)}
    one, other = (sparse(tmp_path / side, DType.F16, shapes) for side in "ab")
    size = (other / "model.safetensors").stat().st_size
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(size - (1 << 27))  # all of q
        for _ in range(1 << 5):
            file.write(b"\x01\x3c" * (1 << 21))
    run_limited("compare", str(one), str(other))
    (other / "model.safetensors").unlink()


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


@pytest.mark.slow
def test_a_grown_vocabulary_is_averaged_in_little_more_than_torch_takes(tmp_path: Path) -> None:
    """The mean is the one operation that imports torch, which takes 150 MB itself, and twice that built for CUDA."""
    name = "model.embed_tokens.weight"
    raw = sparse(tmp_path / "raw", DType.F16, {name: (16_000, 8192)})
    diff = sparse(tmp_path / "diff", DType.F32, {name: (16_001, 8192)})
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


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [8192, 128_256])
def test_wide_embeddings_are_split_and_joined_in_288_mib(tmp_path: Path, vocab: int) -> None:
    """By columns, where each row of the whole is made of a piece from every part."""
    config = {"model_type": "mistral", "hidden_size": 16384, "num_hidden_layers": 1, "intermediate_size": 64}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 8}
    layer, square, narrow = "model.layers.0", (256, 16384), (64, 16384)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocab, 16384))
    shapes |= {f"{layer}.self_attn.{name}_proj.weight": square for name in "qkv"}
    shapes |= {f"{layer}.mlp.{name}_proj.weight": narrow for name in ("gate", "up")}
    shapes |= {f"{layer}.self_attn.o_proj.weight": square[::-1], f"{layer}.mlp.down_proj.weight": narrow[::-1]}
    shapes |= {f"{layer}.{name}_layernorm.weight": (16384,) for name in ("input", "post_attention")}
    raw = sparse(tmp_path / "raw", DType.BF16, {**shapes, "model.norm.weight": (16384,)})
    (raw / "config.json").write_text(json.dumps(config))
    for source, to, *more in (("raw", "meta", "--model-parallel", "2"), ("meta", "hf", "--set", "context_length=8")):
        run_limited("convert", str(tmp_path / source), "--to", to, *more, "--out", str(tmp_path / to))
    shutil.rmtree(tmp_path / "meta")
    shutil.rmtree(tmp_path / "hf")
