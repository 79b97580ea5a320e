"""Speed and memory of merge-lora, cast, shard, check and of a recipe: `make bench-release`.

Figures go to docs/benchmarks.md between the marking lines. Against `cp` of as many bytes, by turns; check against
reading; merge-lora against peft and, where `make mergekit` has made its environment, mergekit; a recipe with two
outputs against its steps one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from bench import (
    SHARD,
    WEIGHTOPS,
    Figures,
    Job,
    drop_cache,
    measure,
    ratio,
    table,
    timed,
    warm_cache,
    weightops,
    write_section,
)
from family import SHAPES, Shape, make
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[1]
MERGEKIT = ROOT / ".venv-mergekit/bin/mergekit-yaml"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
RECIPE = """\
sources: {{raw: {raw}, diff: {diff}, adapter: {adapter}}}
tensors:
  base: {{recover: {{raw: raw, diff: diff}}}}
  chat: {{merge-lora: {{base: base, adapter: adapter}}}}
outputs:
  {out}/chat: {{from: chat, max_shard_size: {size}}}
  {out}/chat-bf16: {{from: chat, dtype: bfloat16, max_shard_size: {size}}}
"""


def make_adapter(shape: Shape, folder: Path, rank: int = 16) -> Path:
    """A LoRA of this rank on all linear layers, as peft writes it."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    random, tensors = np.random.default_rng(7), {}
    for name, dimensions in shape.tensors():
        module = name.removesuffix(".weight")
        if module.endswith(LINEAR):
            out, inner = dimensions
            for part, size in (("A", (rank, inner)), ("B", (out, rank))):
                values = random.standard_normal(size, dtype=np.float32) * np.float32(0.01)
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(LINEAR)}))
    return folder


def jobs(size: str, folder: Path) -> list[Job]:
    raw, wide = folder / "raw", folder / "raw-fp32"
    if not (raw / "config.json").exists():
        make(SHAPES[size], folder)
    adapter = make_adapter(SHAPES[size], folder / "adapter")
    if not wide.exists():
        weightops("cast", str(raw), "--dtype", "float32", "--out", str(wide))
    out = ("--out", str(folder / "out"), "--quiet", "--max-shard-size", SHARD)
    goals = (0.7, 0.9, 1.15) if size == "3b" else (None, None, None)
    merge = ("merge-lora", "--base", str(raw), "--adapter", str(adapter), *out)
    return [
        Job("shard", ("shard", str(raw), *out), (raw,), raw, goals[0]),
        Job("cast, fp32 → fp16", ("cast", str(wide), "--dtype", "float16", *out), (wide,), raw, goals[1]),
        Job("cast, fp16 → bf16", ("cast", str(raw), "--dtype", "bfloat16", *out), (raw,), raw),
        Job("cast, fp16 → fp8 with scales", ("cast", str(raw), "--scheme", "fp8", *out), (raw,), raw),
        Job("merge-lora, rank 16, all linear layers", merge, (raw,), raw, goals[2]),
        Job("merge-lora, the same in float64", (*merge, "--precision", "float64"), (raw,), raw),
    ]


def row(name: str, ours: list[float], theirs: list[float], memory_mb: float) -> str:
    medians = f"{statistics.median(ours):.2f} | {statistics.median(theirs):.2f}"
    return f"| {name} | {medians} | {ratio(ours, theirs)} | {memory_mb:.0f} MB |"


def by_turns(
    name: str,
    ours: Sequence[Sequence[str]],
    theirs: Sequence[Sequence[str]],
    folder: Path,
    reads: Sequence[Path],
    runs: int,
    prepare: Callable[[Sequence[Path]], None] = warm_cache,
) -> str:
    """A row: commands one after another against others, by turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    memory_mb = 0.0
    for _ in range(runs):
        for side, commands in enumerate((ours, theirs)):
            shutil.rmtree(folder / "out", ignore_errors=True)
            prepare(reads)
            figures = [timed(command) for command in commands]
            seconds[side].append(sum(elapsed_s for elapsed_s, _ in figures))
            memory_mb = max(memory_mb, *(peak for _, peak in figures)) if side == 0 else memory_mb
    shutil.rmtree(folder / "out", ignore_errors=True)
    return row(name, *seconds, memory_mb)


def check_rows(size: str, folder: Path, runs: int) -> list[str]:
    raw = folder / "raw"
    paths = sorted(map(str, raw.glob("*.safetensors")))
    read = ["sh", "-c", f"cat {' '.join(paths)} > /dev/null"]
    ours = [WEIGHTOPS, "check", str(raw), "--quiet"]
    return [
        by_turns(
            f"{size}: check, against `cat` of the files, {cache} cache", [ours], [read], folder, [raw], runs, prepare
        )
        for cache, prepare in (("cold", drop_cache), ("warm", warm_cache))
    ]


def chain_rows(size: str, folder: Path, runs: int) -> list[str]:
    """Two outputs from one read, against recover, merge-lora and cast one by one."""
    raw, diff, adapter, out = (folder / name for name in ("raw", "diff-fp16", "adapter", "out"))
    if not diff.exists():
        pair = ("--raw", str(raw), "--tuned", str(folder / "tuned"))
        weightops("diff", *pair, "--method", "subtract", "--dtype", "float16", "--out", str(diff))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            **{
                k: v.resolve()
                for k, v in zip(("raw", "diff", "adapter", "out"), (raw, diff, adapter, out), strict=True)
            },
            size=SHARD,
        )
    )
    last = ("--quiet", "--max-shard-size", SHARD, "--out")
    steps = [
        [WEIGHTOPS, "recover", "--raw", str(raw), "--diff", str(diff), *last, str(out / "base")],
        [WEIGHTOPS, "merge-lora", "--base", str(out / "base"), "--adapter", str(adapter), *last, str(out / "chat")],
        [WEIGHTOPS, "cast", str(out / "chat"), "--dtype", "bfloat16", *last, str(out / "chat-bf16")],
    ]
    name = f"{size}: recover → merge-lora → cast, two outputs, against three commands"
    return [by_turns(name, [[WEIGHTOPS, "run", str(recipe), "--quiet"]], steps, folder, [raw, diff], runs)]


def peer_rows(size: str, folder: Path, runs: int) -> list[str]:
    raw, adapter, out = folder / "raw", folder / "adapter", folder / "out"
    merge = ("merge-lora", "--base", str(raw), "--adapter", str(adapter), "--out", str(out), "--quiet")
    ours = [[WEIGHTOPS, *merge, "--max-shard-size", SHARD]]
    peft = [[sys.executable, "-c", PEFT, str(raw), str(adapter), str(out)]]
    rows = [by_turns(f"{size}: merge-lora, against peft", ours, peft, folder, [raw], runs)]
    if MERGEKIT.exists():
        (folder / "mergekit.yaml").write_text(
            json.dumps({"merge_method": "passthrough", "dtype": "float16", "models": [{"model": f"{raw}+{adapter}"}]})
        )
        cache = ("--lora-merge-cache", str(out / "merged"))
        theirs = [[str(MERGEKIT), str(folder / "mergekit.yaml"), str(out), *cache, "--lora-merge-dtype", "float32"]]
        rows.append(by_turns(f"{size}: merge-lora, against mergekit", ours, theirs, folder, [raw], runs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,3b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    lines = [
        "## Release engineering",
        "",
        f"Written by `make bench-release`: {options.runs} runs of each by turns, warm cache.",
    ]
    compared: list[str] = []
    for size in options.sizes.split(","):
        folder = options.folder / size
        figures: list[Figures] = []
        for job in jobs(size, folder):
            figures.append(measure(job, folder, options.runs, warm_cache))
            print(table(figures[-1:], True)[-1], flush=True)
        shutil.rmtree(folder / "raw-fp32")
        count = sum(math.prod(shape) for _, shape in SHAPES[size].tensors())
        lines += [
            "",
            f"### {count / 1e9:.1f}B parameters, fp16, against `cp` of as many bytes",
            "",
            *table(figures, True),
        ]
        for rows in (check_rows, chain_rows, peer_rows):
            compared += (found := rows(size, folder, options.runs))
            print(*found, sep="\n", flush=True)
    lines += ["", "### Against reading, against single steps, against other tools", ""]
    lines += [
        "| job | seconds | the other's seconds | ratio: median (min to max) | RssAnon peak |",
        "|---|---|---|---|---|",
    ]
    write_section(options.report, "release", [*lines, *compared])


if __name__ == "__main__":
    main()
