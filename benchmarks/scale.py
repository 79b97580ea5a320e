"""What jobs on models of 405B and 1T parameters take, computed from what is measured here: `make bench-scale`.

Measured: processor seconds per GB of commands whose files are in memory, and of reading from and writing to an object
store on this machine (by benchmarks/buckets.py); the time, memory and files that it takes to write jobs on checkpoints
of headers and holes. Computed: minutes by nodes and links. Figures go to docs/scale.md between the marking lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import buckets
import numpy as np
from bench import SHARD, weightops, write_section
from family import SHAPES, Shape, make
from side import Side

DENSE = Shape(hidden=16384, layers=126, ffn=53248, heads=128, kv_heads=8, vocab=128256)
CORES, LINKS_GBIT, NODES, USED = 16, (10, 25, 100), (1, 4, 16), 0.8
"""Cores of a node; its links; how many there are; the share of a link that is really used."""
SHARD_NBYTES = 5_000_000_000
PLAN = f"""
import sys
import weightops
from weightops.engine import preflight

preflight.free_disk = lambda out: 1 << 60  # the output is not going to be written
source, out, job = sys.argv[1:]
weightops.shard(source, out, max_shard_size={SHARD_NBYTES}, job=job)
"""
Tensor = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Cost:
    """Processor seconds per GB: of each run, and what the GB are of."""

    core_s: tuple[float, ...]
    of: str

    @property
    def median(self) -> float:
        return statistics.median(self.core_s)


def sparse(folder: Path, tensors: Sequence[Tensor]) -> int:
    """A checkpoint of headers and holes, in files of at most 5 GB; bytes of its tensors."""
    sizes = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    shards: list[dict[str, dict[str, Any]]] = [{}]
    position, total = 0, 0
    weight_map: dict[str, int] = {}
    for name, dtype, shape in tensors:
        nbytes = int(np.prod(shape)) * sizes[dtype]
        if shards[-1] and position + nbytes > SHARD_NBYTES:
            shards.append({})
            position = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        weight_map[name] = len(shards)
        position, total = position + nbytes, total + nbytes
    folder.mkdir(parents=True)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        text = json.dumps(shard, separators=(",", ":")).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + max(entry["data_offsets"][1] for entry in shard.values()))
    index = {"metadata": {"total_size": total}, "weight_map": {n: names[i - 1] for n, i in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def dense() -> list[Tensor]:
    return [(name, "BF16", shape) for name, shape in DENSE.tensors()]


def mixture() -> list[Tensor]:
    """A mixture of a trillion parameters: 61 layers, 384 experts in FP8 with a scale for each block of 128 x 128."""
    hidden, width = 7168, 2048
    found: list[Tensor] = [
        ("model.embed_tokens.weight", "BF16", (163840, hidden)),
        ("lm_head.weight", "BF16", (163840, hidden)),
    ]
    for layer in range(61):
        prefix = f"model.layers.{layer}"
        matrices = {f"{prefix}.self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        if layer == 0:
            matrices |= {f"{prefix}.mlp.{name}_proj": (18432, hidden) for name in ("gate", "up", "down")}
        for expert in range(384 if layer else 0):
            matrices |= {f"{prefix}.mlp.experts.{expert}.{name}_proj": (width, hidden) for name in ("gate", "up")}
            matrices[f"{prefix}.mlp.experts.{expert}.down_proj"] = (hidden, width)
        for name, (rows, columns) in matrices.items():
            found.append((f"{name}.weight", "F8_E4M3", (rows, columns)))
            found.append((f"{name}.weight_scale_inv", "F32", (rows // 128, columns // 128)))
    return found


def plan_row(title: str, tensors: Sequence[Tensor], folder: Path) -> tuple[str, int]:
    """What writing a job takes, and what each of its workers has to read; and the bytes of the checkpoint."""
    nbytes = sparse(folder / "source", tensors)
    side = Side()
    side.run([sys.executable, "-P", "-c", PLAN, *(str(folder / name) for name in ("source", "out", "job"))])
    groups = [path.stat().st_size for path in (folder / "job/groups").iterdir()]
    shutil.rmtree(folder)
    cells = [title, f"{len(tensors):,}", f"{nbytes / 1e12:.2f} TB", str(len(groups)), f"{side.wall_s[0]:.0f} s"]
    cells += [f"{side.rss_anon_mb[0]:.0f} MB", f"{sum(groups) / 1e6:.1f} MB", f"{max(groups) / 1e3:.0f} KB"]
    return f"| {' | '.join(cells)} |", nbytes


def command_costs(folder: Path, runs: int) -> dict[str, Cost]:
    """Processor seconds of commands, their files on tmpfs."""
    make(SHAPES["1b"], folder)
    raw, tuned = folder / "raw", folder / "tuned"
    nbytes = sum(path.stat().st_size for path in raw.glob("*.safetensors"))
    for name, options in (("plain", ()), ("small", ("--compress",))):
        weightops("diff", "--raw", str(raw), "--tuned", str(tuned), "--out", str(folder / name), *options)
    shutil.rmtree(tuned)
    jobs = {
        "recover": ("recover", "--raw", str(raw), "--diff", str(folder / "plain")),
        "recover, compressed delta": ("recover", "--raw", str(raw), "--diff", str(folder / "small")),
        "shard": ("shard", str(raw)),
        "cast to FP8": ("cast", str(raw), "--scheme", "fp8"),
    }
    sides = {name: Side() for name in jobs}
    for _ in range(runs):
        for name, words in jobs.items():
            out = ("--out", str(folder / "out"), "--max-shard-size", SHARD, "--quiet")
            sides[name].run([sys.executable, "-P", "-m", "weightops", *words, *out])
            shutil.rmtree(folder / "out")
    costs = {name: tuple(s / (nbytes / 1e9) for s in side.processor_s) for name, side in sides.items()}
    return {name: Cost(each, "read" if name.startswith("cast") else "written") for name, each in costs.items()}


def bucket_costs(folder: Path, nbytes: int, runs: int) -> dict[str, Cost]:
    """Processor seconds of a process that reads an object by ranges, and of one that writes one."""
    found: dict[bool, list[float]] = {False: [], True: []}
    with buckets.server(folder) as endpoint:
        with (folder / buckets.BUCKET / buckets.NAME).open("wb") as file:
            file.write(os.urandom(nbytes))
        for _ in range(runs):
            for writes, costs in found.items():
                words = [sys.executable, buckets.__file__, "--child", "**weightops**", "--endpoint", endpoint]
                words += ["--nbytes", str(nbytes), *(["--writes"] if writes else [])]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                costs.append(json.loads(done.stdout)[2] / (nbytes / 1e9))
    return {
        "a bucket, read": Cost(tuple(found[False]), "read"),
        "a bucket, write": Cost(tuple(found[True]), "written"),
    }


@dataclass(frozen=True)
class Work:
    """A job: TB in and out, and processor seconds of it all."""

    title: str
    in_nbytes: float
    out_nbytes: float
    core_s: float


def works(costs: dict[str, Cost], dense_nbytes: int, mixture_nbytes: int, share: float) -> Iterator[Work]:
    """Jobs from bucket to bucket."""
    cost = {name: each.median for name, each in costs.items()}
    per_in, per_out = cost["a bucket, read"], cost["a bucket, write"]

    def work(title: str, name: str, read: float, written: float, of: float) -> Work:
        return Work(title, read, written, (cost[name] * of + per_in * read + per_out * written) / 1e9)

    n, m = dense_nbytes, mixture_nbytes
    yield work("recover 405B bf16, plain delta", "recover", 2 * n, n, n)
    yield work("recover 405B bf16, compressed delta", "recover, compressed delta", n + share * n, n, n)
    yield work("cast 405B bf16 to FP8", "cast to FP8", n, n / 2, n)
    yield work("shard 1T FP8", "shard", m, m, m)


def work_row(work: Work) -> str:
    cells = [work.title, f"{work.in_nbytes / 1e12:.2f} / {work.out_nbytes / 1e12:.2f}", f"{work.core_s / 3600:.1f}"]
    for nodes in NODES:
        minutes = []
        for link in LINKS_GBIT:
            link_s = max(work.in_nbytes, work.out_nbytes) / (nodes * link / 8 * 1e9 * USED)
            core_s = work.core_s / (nodes * CORES)
            most = max(link_s, core_s) / 60
            minutes.append(f"{'<1' if most < 1 else round(most)}{'*' if core_s > link_s else ''}")
        cells.append(" / ".join(minutes))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--nbytes", type=int, default=1_000_000_000, help="of a file in the object store")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/weightops-scale"), help="on tmpfs, 9 GB")
    parser.add_argument("--report", type=Path, default=Path("docs/scale.md"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, options.folder, ignore_errors=True)
        plans = [
            plan_row("405B, dense, bf16", dense(), options.folder / "plan"),
            plan_row("1T, 384 experts a layer, FP8", mixture(), options.folder / "plan"),
        ]
        print(*(row for row, _ in plans), sep="\n", flush=True)
        costs = bucket_costs(options.folder / "bucket", options.nbytes, options.runs)
        costs = command_costs(options.folder, options.runs) | costs
    small = 0.34  # of a fine-tune in bfloat16, by benchmarks/deltas.py
    rates = [
        f"| {name} | {cost.median:.2f} ({min(cost.core_s):.2f} to {max(cost.core_s):.2f}) | {cost.of} |"
        for name, cost in costs.items()
    ]
    table = [work_row(work) for work in works(costs, plans[0][1], plans[1][1], small)]
    lines = [
        "## Measured",
        "",
        f"By `make bench-scale`, {options.runs} runs by turns on {os.cpu_count()} cores, with a load of {load:.0f}",
        "from other work before the first: take them for what a busy core does.",
        "",
        "| | processor seconds per GB: median (min to max) | GB that are |",
        "|---|---|---|",
        *rates,
        "",
        "Commands ran on files in memory, 1.1B parameters; the bucket is a server on the same machine, whose own work",
        "does not count, over http without TLS.",
        "",
        "Writing the job of `shard`, from headers and holes (files of 5 GB that take no disk):",
        "",
        "| checkpoint | tensors | size | groups | time | RssAnon peak | all groups | largest group |",
        "|---|---|---|---|---|---|---|---|",
        *(row for row, _ in plans),
        "",
        "## Computed",
        "",
        f"From bucket to bucket, in minutes, for nodes of {CORES} such cores whose links are used to {USED:.0%}, in",
        "both directions at once; an asterisk where it waits for the cores. A compressed delta is taken for",
        f"{small} of the plain one.",
        "",
        f"| job | TB in / out | core-hours | 1 node: {' / '.join(map(str, LINKS_GBIT))} Gb/s | 4 nodes | 16 nodes |",
        "|---|---|---|---|---|---|",
        *table,
    ]
    print("\n".join(lines))
    write_section(options.report, "scale", lines)


if __name__ == "__main__":
    main()
