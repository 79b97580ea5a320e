"""Where the disk costs nothing: wall and processor seconds on a file system in memory: `make bench-processor`.

Every command and `cat` of its inputs with `cp` of as many bytes as it writes, by turns, as whole processes. With
`--before` another checkout of weightops takes its turn as well, run by the same Python. Figures go to
docs/benchmarks.md between the marking lines.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import SHARD, files, ratio, weightops, write_section
from family import SHAPES, make
from release import make_adapter

GOALS = {
    "recover, exact delta": 1.15,
    "recover, fp16 diff": 1.15,
    "shard": 0.8,
    "merge-lora, rank 16": 1.5,
    "check": 3.0,
}


@dataclass
class Side:
    """Seconds of each run of one of the contestants."""

    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)


def timed(arguments: Sequence[str], environment: dict[str, str], side: Side) -> None:
    """Run to the end; its wall seconds, and those of processors that it and its children used."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, env=environment)
    side.wall_s.append(time.perf_counter() - start)
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    side.processor_s.append(used)


def jobs(folder: Path) -> dict[str, tuple[tuple[str, ...], tuple[Path, ...], Path | None]]:
    """Arguments, what is read, and what `cp` copies: the output has as many bytes."""
    raw, tuned, delta, diff = (folder / name for name in ("raw", "tuned", "delta", "diff-fp16"))
    if not (raw / "config.json").exists():
        make(SHAPES["1b"], folder)
    adapter = make_adapter(SHAPES["1b"], folder / "adapter")
    pair = ("diff", "--raw", str(raw), "--tuned", str(tuned))
    if not diff.exists():
        weightops(*pair, "--method", "subtract", "--dtype", "float16", "--out", str(diff))
    if not delta.exists():
        weightops(*pair, "--out", str(delta))
    out = ("--out", str(folder / "out"), "--max-shard-size", SHARD, "--quiet")
    merge = ("merge-lora", "--base", str(raw), "--adapter", str(adapter), *out)
    return {
        "recover, exact delta": (("recover", "--raw", str(raw), "--diff", str(delta), *out), (raw, delta), raw),
        "recover, fp16 diff": (("recover", "--raw", str(raw), "--diff", str(diff), *out), (raw, diff), raw),
        "shard": (("shard", str(raw), *out), (raw,), raw),
        "merge-lora, rank 16": (merge, (raw,), raw),
        "check": (("check", str(raw), "--quiet"), (raw,), None),
    }


def baseline(reads: Sequence[Path], copies: Path | None, scratch: Path) -> list[str]:
    script = f"cat {' '.join(map(str, files(reads)))} > /dev/null"
    if copies is not None:
        script += f"; mkdir {scratch}; cp {' '.join(map(str, files([copies])))} {scratch}/"
    return ["sh", "-c", script]


def measure(folder: Path, runs: int, before: Path | None, name: str) -> str:
    """One row: medians of seconds, and of the ratios of turns that were next to each other, with their spread."""
    arguments, reads, copies = jobs(folder)[name]
    trees = [Path(__file__).parents[1], *([before] if before else [])]
    sides, base = [Side() for _ in trees], Side()
    for _ in range(runs):
        for tree, side in zip(trees, sides, strict=True):
            shutil.rmtree(folder / "out", ignore_errors=True)
            environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}"}
            timed([sys.executable, "-P", "-m", "weightops", *arguments], environment, side)
        shutil.rmtree(folder / "out", ignore_errors=True)
        timed(baseline(reads, copies, folder / "out"), dict(os.environ), base)
    shutil.rmtree(folder / "out", ignore_errors=True)

    now, *earlier = sides
    cells = [name, f"{statistics.median(now.wall_s):.2f}", f"{statistics.median(base.wall_s):.2f}"]
    cells += [ratio(now.wall_s, base.wall_s), ratio(now.processor_s, base.processor_s), f"≤ {GOALS[name]}"]
    for side in earlier:
        cells += [ratio(side.wall_s, base.wall_s), ratio(side.processor_s, base.processor_s)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/weightops-bench"), help="on tmpfs, 12 GB")
    parser.add_argument("--before", type=Path, help="another checkout, to be measured beside this one")
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    # Modules are compiled once, as they are where pip has installed them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    columns = [
        "job",
        "seconds",
        "cat; cp, seconds",
        "ratio of wall: median (min to max)",
        "of processor seconds",
        "goal",
    ]
    if options.before:
        columns += ["before: of wall", "before: of processor seconds"]
    rows = []
    for name in GOALS:
        rows.append(measure(options.folder, options.runs, options.before, name))
        print(rows[-1], flush=True)
    lines = [
        "## Where the disk costs nothing",
        "",
        f"Written by `make bench-processor`: {options.runs} runs of each by turns at 1.1B parameters, on tmpfs,",
        f"against `cat` of the inputs and `cp` of as many bytes as are written, on {os.cpu_count()} cores.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *rows,
    ]
    write_section(options.report, "processor", lines)


if __name__ == "__main__":
    main()
