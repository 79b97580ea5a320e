"""Two adapters of a large model combined, by methods that need no products of its size: `make bench-adapters`.

The adapters are random, of all linear layers of a model of LLaMA's sizes. Seconds are those of a whole command with its
output on disk; memory is RssAnon.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from bench import timed, write_section
from safetensors.torch import save_file

SIZES = {"7b": (4096, 11008, 32), "1b": (2048, 5632, 22)}
"""Hidden and intermediate size, and layers."""
METHODS = ("cat", "linear", "ties", "svd")
GOAL_S = 20.0


def save(folder: Path, size: str, rank: int, seed: int) -> None:
    """A random adapter in bfloat16."""
    hidden, intermediate, layers = SIZES[size]
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    tensors = {}
    for layer in range(layers):
        for module, (out, width) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            for letter, shape in (("A", (rank, width)), ("B", (out, rank))):
                values = torch.randn(shape, generator=generator) * 0.02
                tensors[f"{stem}.lora_{letter}.weight"] = values.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    names = sorted(name.rpartition(".")[2] for name in shapes)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def rows(size: str, rank: int, runs: int) -> list[str]:
    """Lines of the report."""
    lines = ["| method | seconds: median (min to max) | goal | RssAnon peak |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        for seed, name in enumerate(("one", "two")):
            save(folder / name, size, rank, seed)
        for method in METHODS:
            seconds, peaks = [], []
            for _ in range(runs):
                shutil.rmtree(folder / "out", ignore_errors=True)
                command = [sys.executable, "-m", "weightops", "adapter", "combine", folder / "one", folder / "two"]
                command += ["--weights", "0.75,-0.5", "--method", method, "--out", folder / "out", "--quiet"]
                command += ["--density", "0.5"] if method == "ties" else []
                elapsed_s, peak_mb = timed([str(word) for word in command])
                seconds.append(elapsed_s)
                peaks.append(peak_mb)
            spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            goal = f"≤ {GOAL_S:g}" if size == "7b" else ""
            lines.append(f"| `{method}` | {spread} | {goal} | {max(peaks):.0f} MB |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    lines = [
        "## Adapters",
        "",
        f"Written by `make bench-adapters`: two random adapters of rank {options.rank} in bfloat16, of all linear "
        f"layers of a model of LLaMA {options.size}'s sizes, become one in float32; {options.runs} runs, warm cache.",
        "",
        *rows(options.size, options.rank, options.runs),
    ]
    write_section(options.report, "adapters", lines)


if __name__ == "__main__":
    main()
