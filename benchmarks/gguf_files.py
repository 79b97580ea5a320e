"""GGUF files in and out against the disk, and the memory of an importance matrix: `make bench-gguf`.

By turns with `cat` of the input, `cp` of as many bytes as are written, and `sync`, warm cache. Values are random, but
those of a family, so that the search for scales is that of any model; the importance matrix is of a few windows of
words that say nothing, because memory does not depend on how many they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench import WEIGHTOPS, ratio, write_section
from convert import prepare
from family import SHAPES
from side import Side

FILES = {"F16": "float16", "Q4_K_M": "q4_k_m"}


@dataclass(frozen=True)
class Job:
    """A command, what follows it, and what it reads."""

    name: str
    arguments: tuple[str, ...]
    reads: tuple[Path, ...]


def weightops(*arguments: str) -> None:
    subprocess.run([WEIGHTOPS, *arguments, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def files(raw: Path, folder: Path) -> dict[str, Path]:
    """The model as GGUF files, by type."""
    made = {kind: folder / "gguf" / f"{kind}.gguf" for kind in FILES}
    (folder / "gguf").mkdir(exist_ok=True)
    for kind, path in made.items():
        if not path.exists():
            how = ("--to", "gguf", "--dtype", FILES[kind], "--set", "context_length=2048")
            weightops("convert", str(raw), *how, "--out", str(path))
    return made


def jobs(size: str, folder: Path) -> list[Job]:
    raw, _ = prepare(size, folder)
    weights = tuple(sorted(raw.glob("*.safetensors")))
    found = files(raw, folder)
    out = ("--to", "gguf", "--set", "context_length=2048", "--dtype")
    return [
        *(Job(f"{kind} → hf", ("convert", str(path), "--to", "hf"), (path,)) for kind, path in found.items()),
        *(Job(f"hf → {kind}", ("convert", str(raw), *out, dtype), weights) for kind, dtype in FILES.items()),
    ]


def row(job: Job, folder: Path, runs: int) -> str:
    """Seconds, memory and ratio of a job; what is copied is what it has written."""
    out, scratch = folder / "out", folder / "copy"
    ours, disk = Side(), Side()
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(["cat", *map(str, job.reads)], stdout=subprocess.DEVNULL, check=True)
        ours.run([WEIGHTOPS, *job.arguments, "--out", str(out), "--quiet"])
        shutil.rmtree(scratch, ignore_errors=True)
        script = f"cat {' '.join(map(str, job.reads))} > /dev/null; cp -r {out} {scratch}"
        disk.run(["sh", "-c", script])
    nbytes = sum(path.stat().st_size for path in out.iterdir())
    for path in (out, scratch):
        shutil.rmtree(path)
    cells = [job.name, f"{nbytes / 1e9:.2f}", f"{statistics.median(ours.wall_s):.1f}"]
    cells += [f"{statistics.median(ours.processor_s):.1f}", f"{statistics.median(disk.wall_s):.1f}"]
    return f"| {' | '.join([*cells, f'{max(ours.rss_anon_mb):.0f}', ratio(ours.wall_s, disk.wall_s)])} |"


def importance(size: str, folder: Path, samples: int) -> str:
    """Seconds and memory of `weightops imatrix`."""
    raw, _ = prepare(size, folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (raw / "tokenizer_config.json").write_text(json.dumps(settings))
    letters, chance = list("abcdefghijklmnopqrstuvwxyz"), np.random.default_rng(0)
    words = ["".join(chance.choice(letters, 4)) for _ in range(samples * 1024)]
    (folder / "words.txt").write_text(" ".join(words))
    side, out = Side(), folder / "imatrix.gguf"
    out.unlink(missing_ok=True)
    how = ("--calibration", str(folder / "words.txt"), "--samples", str(samples), "--out", str(out), "--overwrite")
    side.run([WEIGHTOPS, "imatrix", str(raw), *how, "--quiet"])
    return f"| {size}, {samples} windows | {side.wall_s[0]:.1f} | {side.rss_anon_mb[0]:.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--samples", type=int, default=4, help="windows of the importance matrix")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(arguments)
    folder = (options.folder / options.size).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "## GGUF",
        "",
        f"Written by `make bench-gguf`: {options.size} parameters, {options.runs} runs by turns with `cat` of",
        "the input and `cp` of what was written, warm cache.",
        "",
        "| job | GB written | wall, s | processor, s | cat and cp, s | RssAnon, MB | wall / theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for job in jobs(options.size, folder):
        lines.append(row(job, folder, options.runs))
        print(lines[-1], flush=True)
    lines += ["", "| `imatrix` | wall, s | RssAnon, MB |", "|---|---|---|"]
    lines.append(importance(options.size, folder, options.samples))
    print(lines[-1], flush=True)
    write_section(options.report, "gguf", lines)


if __name__ == "__main__":
    main()
