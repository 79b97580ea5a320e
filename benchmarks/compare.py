"""Speed and memory of compare: `make bench-compare`.

Against `cat` of both models, by turns, from a cold and from a warm cache: a model and its copy, one that was tuned
everywhere, its cast, and one that a LoRA was merged into, whose matrices are read twice more for their rank. Figures go
to docs/benchmarks.md between the marking lines.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from bench import WEIGHTOPS, drop_cache, files, warm_cache, weightops, write_section
from family import SHAPES, make
from release import by_turns, make_adapter

GOALS = {"cold": "≤ 1.5", "warm": ""}


def pairs(size: str, folder: Path) -> dict[str, tuple[Path, Path]]:
    """What is compared, made where it is not there."""
    raw, tuned = folder / "raw", folder / "tuned"
    copy, cast, merged = folder / "raw-copy", folder / "raw-bf16", folder / "raw-merged"
    if not (raw / "config.json").exists():
        make(SHAPES[size], folder)
    if not copy.exists():
        shutil.copytree(raw, copy)
    if not cast.exists():
        weightops("cast", str(raw), "--dtype", "bfloat16", "--out", str(cast))
    if not merged.exists():
        adapter = make_adapter(SHAPES[size], folder / "adapter")
        weightops("merge-lora", "--base", str(raw), "--adapter", str(adapter), "--out", str(merged))
    return {
        "equal": (raw, copy),
        "tuned everywhere": (raw, tuned),
        "cast to bfloat16": (raw, cast),
        "a LoRA merged, rank 16, all linear layers": (raw, merged),
    }


def rows(size: str, folder: Path, runs: int) -> list[str]:
    found = []
    for name, (a, b) in pairs(size, folder).items():
        ours = [WEIGHTOPS, "compare", str(a), str(b), "--quiet"]
        read = ["sh", "-c", f"cat {' '.join(map(str, files([a, b])))} > /dev/null"]
        for cache, prepare in (("cold", drop_cache), ("warm", warm_cache)):
            title = f"{size}: {name}, {cache} cache"
            found.append(by_turns(title, [ours], [read], folder, [a, b], runs, prepare) + f" {GOALS[cache]} |")
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,3b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    lines = ["## Comparing", "", f"Written by `make bench-compare`: {options.runs} runs of each by turns.", ""]
    lines += ["| two models | seconds | `cat` of both, seconds | ratio: median (min to max) | RssAnon peak | goal |"]
    lines += ["|---|---|---|---|---|---|"]
    for size in options.sizes.split(","):
        lines += rows(size, options.folder / size, options.runs)
    write_section(options.report, "compare", lines)


if __name__ == "__main__":
    main()
