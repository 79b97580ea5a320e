"""Surgery against copying: parts, experts, layers and vocabularies, each beside `cp` of what it writes.

`make bench-surgery`.

What only moves tensors should take about the time of copying them. Values are random. The mixture is made of the model
by `experts --from-dense`, the model that sees is the same under other names.
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

from bench import WEIGHTOPS, ratio, write_section
from family import SHAPES, make
from side import Side

COPIES = 4


@dataclass(frozen=True)
class Job:
    """A command without its output."""

    name: str
    arguments: tuple[str, ...]


def weightops(*arguments: str) -> None:
    subprocess.run([WEIGHTOPS, *arguments, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def raw_model(size: str, folder: Path) -> Path:
    """A LLaMA of this size."""
    if not (folder / "raw/config.json").exists():
        make(SHAPES[size], folder)
    return folder / "raw"


def sighted(raw: Path, folder: Path) -> Path:
    """The model within one that sees, whose tower is a single tensor: it is not what is timed."""
    out = folder / "sighted"
    if not out.exists():
        weightops("shard", str(raw), "--add-prefix", "language_model.", "--out", str(out))
        config = json.loads((raw / "config.json").read_text())
        whole = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": config}
        (out / "config.json").write_text(json.dumps({**whole, "vision_config": {"model_type": "clip_vision_model"}}))
        (out / "weightops-manifest.json").unlink()
    return out


def mixture(raw: Path, folder: Path) -> Path:
    """So many copies of the model's MLPs, with a random router."""
    out = folder / "mixture"
    if not out.exists():
        experts = [{"source_model": str(raw)}] * COPIES
        document = {"base_model": str(raw), "gate_mode": "random", "experts": experts}
        (folder / "moe.yml").write_text(json.dumps(document))
        weightops("experts", "--from-dense", str(folder / "moe.yml"), "--out", str(out))
    return out


def jobs(size: str, mixture_size: str, folder: Path) -> list[Job]:
    raw = raw_model(size, folder / size)
    whole = sighted(raw, folder / size)
    mixed = mixture(raw_model(mixture_size, folder / mixture_size), folder / mixture_size)
    layers = SHAPES[size].layers
    deeper = f"0-{layers // 2 - 1},{layers // 2 - 1}=,{layers // 2}-{layers - 1},{layers - 1}="
    return [
        Job("`part --take text`", ("part", str(whole), "--take", "text")),
        Job("`experts --keep`, 3 of 4", ("experts", str(mixed), "--keep", "0-2")),
        Job("`experts --layout stacked`", ("experts", str(mixed), "--layout", "stacked")),
        Job("`shard --layers`, 2 silent copies", ("shard", str(raw), "--layers", deeper)),
        Job("`vocab --rows`, 128 more, mean", ("vocab", str(raw), "--rows", str(SHAPES[size].vocab + 128))),
    ]


def row(job: Job, folder: Path, runs: int) -> str:
    """Seconds, memory and ratio of a job."""
    out, scratch = folder / "out", folder / "copy"
    ours, disk = Side(), Side()
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        ours.run([WEIGHTOPS, *job.arguments, "--out", str(out), "--quiet"])
        shutil.rmtree(scratch, ignore_errors=True)
        disk.run(["cp", "-r", str(out), str(scratch)])
    nbytes = sum(path.stat().st_size for path in out.iterdir())
    for path in (out, scratch):
        shutil.rmtree(path)
    cells = [job.name, f"{nbytes / 1e9:.2f}", f"{statistics.median(ours.wall_s):.1f}"]
    cells += [f"{statistics.median(ours.processor_s):.1f}", f"{statistics.median(disk.wall_s):.1f}"]
    return f"| {' | '.join([*cells, f'{max(ours.rss_anon_mb):.0f}', ratio(ours.wall_s, disk.wall_s)])} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", choices=SHAPES, default="3b")
    parser.add_argument("--mixture-size", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "## Surgery",
        "",
        f"Written by `make bench-surgery`: a LLaMA of {options.size}, a mixture of {COPIES} times",
        f"{options.mixture_size}, {options.runs} runs by turns with `cp` of what was written, up to the bytes being on",
        "disk.",
        "",
        "| job | GB written | wall, s | processor, s | cp, s | RssAnon, MB | wall / cp |",
        "|---|---|---|---|---|---|---|",
    ]
    for job in jobs(options.size, options.mixture_size, folder):
        lines.append(row(job, folder, options.runs))
        print(lines[-1], flush=True)
    write_section(options.report, "surgery", lines)


if __name__ == "__main__":
    main()
