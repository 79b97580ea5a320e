"""Speed and memory of compare: `make bench-compare`.

Against `cat` of both models, by turns, from a cold and from a warm cache: a model and its copy, one that was tuned
everywhere, its cast, and one that a LoRA was merged into, in float16 and in bfloat16. Where others share the cores, the
processor's seconds say more than those of the clock. Figures go to docs/benchmarks.md between the marking lines.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import WEIGHTOPS, drop_cache, files, ratio, timed, warm_cache, weightops, write_section
from family import SHAPES, make
from release import make_adapter

GOALS = {"cold": "≤ 1.5", "warm": ""}


def pairs(size: str, folder: Path) -> dict[str, tuple[Path, Path]]:
    """What is compared, made where it is not there."""
    raw, tuned = folder / "raw", folder / "tuned"
    copy, cast, merged = folder / "raw-copy", folder / "raw-bf16", folder / "raw-merged"
    merged_cast = folder / "raw-bf16-merged"
    if not (raw / "config.json").exists():
        make(SHAPES[size], folder)
    if not copy.exists():
        shutil.copytree(raw, copy)
    if not cast.exists():
        weightops("cast", str(raw), "--dtype", "bfloat16", "--out", str(cast))
    for base, out in ((raw, merged), (cast, merged_cast)):
        if not out.exists():
            adapter = make_adapter(SHAPES[size], folder / "adapter")
            weightops("merge-lora", "--base", str(base), "--adapter", str(adapter), "--out", str(out))
    return {
        "equal": (raw, copy),
        "tuned everywhere": (raw, tuned),
        "cast to bfloat16": (raw, cast),
        "a LoRA merged, rank 16, all linear layers": (raw, merged),
        "the same in bfloat16": (cast, merged_cast),
    }


def processor_s() -> float:
    """What the children that have ended took, in the kernel too."""
    times = os.times()
    return times.children_user + times.children_system


def row(title: str, pair: Sequence[Path], runs: int, prepare: Callable[[Sequence[Path]], None], goal: str) -> str:
    """Compare and `cat` of what it reads, by turns: seconds, processor's seconds, peak memory."""
    ours = [WEIGHTOPS, "compare", *map(str, pair), "--quiet"]
    read = ["sh", "-c", f"cat {' '.join(map(str, files(pair)))} > /dev/null"]
    wall: tuple[list[float], list[float]] = ([], [])
    used: tuple[list[float], list[float]] = ([], [])
    memory_mb = 0.0
    for _ in range(runs):
        for side, command in enumerate((ours, read)):
            prepare(pair)
            before_s = processor_s()
            elapsed_s, peak = timed(command)
            wall[side].append(elapsed_s)
            used[side].append(processor_s() - before_s)
            memory_mb = max(memory_mb, 0.0 if side else peak)
    seconds = (f"{statistics.median(w):.2f} ({statistics.median(u):.2f})" for w, u in zip(wall, used, strict=True))
    return f"| {title} | {' | '.join(seconds)} | {ratio(*wall)} | {memory_mb:.0f} MB | {goal} |"


def rows(size: str, folder: Path, runs: int, warm_runs: int) -> list[str]:
    found = []
    for name, pair in pairs(size, folder).items():
        for cache, prepare, count in (("cold", drop_cache, runs), ("warm", warm_cache, warm_runs)):
            found.append(row(f"{size}: {name}, {cache} cache", pair, count, prepare, GOALS[cache]))
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,3b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warm-runs", type=int, help="by default as many")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    warm_runs = options.warm_runs or options.runs
    lines = [
        "## Comparing",
        "",
        f"Written by `make bench-compare`: {options.runs} runs of each by turns with a cold cache, {warm_runs} with "
        "a warm one. Beside the seconds, in brackets, stand those of the processor, of two cores.",
        "",
        "| two models | seconds | `cat` of both, seconds | ratio: median (min to max) | RssAnon peak | goal |",
        "|---|---|---|---|---|---|",
    ]
    for size in options.sizes.split(","):
        lines += rows(size, options.folder / size, options.runs, warm_runs)
    write_section(options.report, "compare", lines)


if __name__ == "__main__":
    main()
