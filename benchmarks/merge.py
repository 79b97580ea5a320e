"""Merging three models by every method, against mergekit and against the disk: `make bench-merge`.

Models of 1.1B parameters in bfloat16, a base and two that were changed by a tenth of their size. Whole processes, by
turns: ours, mergekit (which `make mergekit` installs), and the floor, which is `cat` of all inputs, `cp` of as many
bytes as are written, and `sync`. Figures go to docs/benchmarks.md between the marking lines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from bench import files, ratio, write_section
from family import SHAPES, Shape, header, split
from side import Side

ROOT = Path(__file__).resolve().parents[1]
MERGEKIT = ROOT / ".venv-mergekit/bin/mergekit-yaml"
SHARD_NBYTES = 500_000_000
_POOL = 1 << 24

MODELS = ("base", "a", "b")
TWO = "models: [{model: FIRST}, {model: SECOND}]"
WEIGHTED = "models: [{model: FIRST, parameters: {weight: 0.6}}, {model: SECOND, parameters: {weight: 0.4}}]"
THINNED = f"parameters: {{density: 0.5}}\n{WEIGHTED}"
CASES = {
    "linear": f"base_model: BASE\nparameters: {{weight: 0.3}}\n{WEIGHTED}",
    "slerp": (
        "base_model: FIRST\nparameters: {t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, "
        f"{{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}, {{value: 0.5}}]}}\n{TWO}"
    ),
    "nuslerp": WEIGHTED,
    "multislerp": f"base_model: BASE\n{WEIGHTED}",
    "karcher": TWO,
    "task_arithmetic": f"base_model: BASE\n{WEIGHTED}",
    "ties": f"base_model: BASE\n{THINNED}",
    "dare_linear": f"base_model: BASE\n{THINNED}",
    "dare_ties": f"base_model: BASE\n{THINNED}",
    "breadcrumbs": f"base_model: BASE\n{THINNED}",
    "breadcrumbs_ties": f"base_model: BASE\n{THINNED}",
    "della": f"base_model: BASE\n{THINNED}",
    "della_linear": f"base_model: BASE\n{THINNED}",
    "sce": f"base_model: BASE\nparameters: {{select_topk: 0.5}}\n{TWO}",
    "model_stock": f"base_model: BASE\n{TWO}",
    "nearswap": f"base_model: FIRST\nparameters: {{t: 0.001}}\n{TWO}",
    "arcee_fusion": f"base_model: FIRST\n{TWO}",
    "ram": f"base_model: BASE\n{TWO}",
    "ramplus_tl": f"base_model: BASE\n{TWO}",
    "passthrough": (
        "slices: [{sources: [{model: FIRST, layer_range: [0, 16]}]}, "
        "{sources: [{model: SECOND, layer_range: [8, 22]}]}]"
    ),
}
"""What mergekit's files say besides merge_method and dtype; BASE, FIRST and SECOND are the models."""


def _values(seed: int) -> Iterator[np.ndarray]:
    """Blocks of random numbers as large as weights are, float32, of a pool that is read at other places each time."""
    random = np.random.default_rng(seed)
    pool = (random.standard_normal(_POOL, dtype=np.float32) * 0.02).astype(np.float32)
    while True:
        at = int(random.integers(0, _POOL - (1 << 22)))
        yield pool[at : at + (1 << 22)]


def make_models(shape: Shape, folder: Path) -> None:
    """The base, and two models that differ from it by a tenth of its size, in bfloat16."""
    shards = split(shape, SHARD_NBYTES)
    base, changes = _values(1), [_values(2), _values(3)]
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for model in MODELS:
            (folder / model).mkdir(parents=True, exist_ok=True)
        outputs = [(folder / model / name).open("wb") for model in MODELS]
        for file in outputs:
            file.write(header(sorted(tensors), "BF16"))
        for tensor, size in sorted(tensors):
            weight_map[tensor] = name
            for start in range(0, int(np.prod(size)), 1 << 22):
                count = min(1 << 22, int(np.prod(size)) - start)
                own = next(base)[:count]
                for file, values in zip(outputs, (own, *(own + next(c)[:count] / 10 for c in changes)), strict=True):
                    file.write(memoryview((values.view(np.uint32) >> 16).astype("<u2")))
        for file in outputs:
            file.close()
    for model in MODELS:
        config = {**shape.config(), "torch_dtype": "bfloat16"}
        (folder / model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def floor(reads: Sequence[Path], out: Path, scratch: Path) -> list[str]:
    """`cat` of the inputs, `cp` of what was written."""
    shutil.rmtree(scratch, ignore_errors=True)
    copies = " ".join(map(str, files([out])))
    return ["sh", "-c", f"cat {' '.join(map(str, files(reads)))} > /dev/null; mkdir {scratch}; cp {copies} {scratch}/"]


def measure(folder: Path, method: str, runs: int, theirs: bool) -> str:
    """One row: medians, and of ratios of turns that were next to each other their spread."""
    places = {"BASE": "base", "FIRST": "a", "SECOND": "b"}
    text = CASES[method]
    for word, model in places.items():
        text = text.replace(word, str(folder / model))
    path = folder / f"{method}.yml"
    path.write_text(f"merge_method: {method}\ndtype: bfloat16\n{text}\n")
    reads = [folder / model for model in MODELS if str(folder / model) in text]
    out, scratch = folder / "out", folder / "scratch"
    ours, peer, disk = Side(), Side(), Side()
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        ours.run([sys.executable, "-P", "-m", "weightops", "merge", str(path), "--out", str(out), "--quiet"])
        disk.run(floor(reads, out, scratch))
        shutil.rmtree(scratch, ignore_errors=True)
        if theirs:
            shutil.rmtree(out, ignore_errors=True)
            peer.run([str(MERGEKIT), str(path), str(out), "--random-seed", "1", "--quiet"])
    shutil.rmtree(out, ignore_errors=True)
    median = statistics.median
    cells = [method, f"{median(ours.wall_s):.1f}", f"{median(ours.processor_s):.1f}", f"{max(ours.rss_anon_mb):.0f}"]
    cells.append(ratio(ours.wall_s, disk.wall_s))
    if theirs:
        cells += [f"{median(peer.wall_s):.1f}", f"{median(peer.processor_s):.1f}", f"{max(peer.rss_anon_mb):.0f}"]
        cells += [ratio(peer.wall_s, ours.wall_s), ratio(peer.processor_s, ours.processor_s)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-merge"), help="takes 12 GB")
    parser.add_argument("--method", action="append", choices=CASES, help="only these")
    parser.add_argument("--no-report", action="store_true", help="print the figures alone")
    parser.add_argument("--ours", action="store_true", help="leave mergekit out")
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    folder = options.folder.resolve()
    if not (folder / "b/config.json").exists():
        make_models(SHAPES[options.size], folder)
    theirs = MERGEKIT.exists() and not options.ours
    columns = ["method", "wall, s", "processor, s", "RssAnon, MB", "wall / disk's"]
    columns += ["mergekit: wall, s", "processor, s", "RssAnon, MB", "wall / ours", "processor / ours"] if theirs else []
    rows = []
    for method in options.method or CASES:
        rows.append(measure(folder, method, options.runs, theirs))
        print(rows[-1], flush=True)
    lines = [
        "## Merging",
        "",
        f"Written by `make bench-merge`: {options.runs} runs of each by turns, models of {options.size} parameters in",
        f"bfloat16, a base and two others, on {os.cpu_count()} cores. The disk's time is that of `cat` of the inputs,",
        "`cp` of the output and `sync`.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *rows,
    ]
    if not options.no_report:
        write_section(options.report, "merge", lines)


if __name__ == "__main__":
    main()
