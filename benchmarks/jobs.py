"""What it costs that a job is made of files, and what others cost who do it: `make bench-jobs`.

Whole commands by turns: `recover` as one run and by way of a job on this machine; a merge by two threads of one
process and by a Dask cluster of two workers that is up. And of a mixture of a trillion parameters, from headers and
holes: what writing its job, a worker beside its blocks, and `finish` take. Figures go to docs/benchmarks.md between the
marking lines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import SHARD, ratio, weightops, write_section
from family import SHAPES, make
from scale import PLAN, mixture, sparse
from side import Side

WORK = """
import sys
from weightops.engine.control import Control
from weightops.engine.job.documents import read_group
from weightops.engine.job.place import OpenJob

control = Control()
job = OpenJob(sys.argv[1], control.stores)
group = read_group(job.store, job.document, int(sys.argv[2]))
for plan in group.plans.values():
    plan.total_nbytes
import weightops.engine.job.work
"""
"""What a worker does before its first block."""
RECORDS = """
import sys
from pathlib import Path

import msgspec
from weightops.engine.control import Control
from weightops.engine.job.documents import GroupRecord, read_group, record_name
from weightops.engine.job.place import OpenJob
from weightops.engine.records import ShardRecord

job = OpenJob(sys.argv[1], Control().stores)
for number in range(job.document.groups):
    shards = {}
    for output, plan in read_group(job.store, job.document, number).plans.items():
        for shard in plan.shards:
            path = Path(job.document.outputs[output].out + ".partial", "output", shard.name)
            with path.open("wb") as file:
                file.truncate(plan.shard_nbytes[shard.name])
            tensors = dict.fromkeys(shard.tensors, "0" * 32)
            record = ShardRecord(
                name=shard.name, nbytes=plan.shard_nbytes[shard.name], sample="0" * 32, digests={"xxh3_128": "0" * 32},
                tensors=tensors, witnesses=dict.fromkeys(shard.tensors, "0" * 32),
            )
            shards.setdefault(output, []).append(record)
    record = GroupRecord(job=job.document.fingerprint, shards={o: tuple(s) for o, s in shards.items()})
    job.store.put(record_name(number), msgspec.json.encode(record))
"""
"""Records of groups that nobody has done, and files of holes in the places of theirs."""
LIGHT = (sys.executable, "-P", "-c")
COMMAND = (sys.executable, "-P", "-m", "weightops")


def removed(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def door_row(folder: Path, runs: int) -> str:
    """Recovering by one run, and by way of a job."""
    line = [*COMMAND, "recover", "--raw", str(folder / "raw"), "--diff", str(folder / "diff")]
    line += ["--max-shard-size", SHARD]
    run, job = Side(), Side()
    for turn in range(runs):
        for side in (run, job) if turn % 2 else (job, run):
            words = ["--job", str(folder / "job"), "--executor", "threads"] if side is job else []
            side.run([*line, "--quiet", "--out", str(folder / "out"), *words])
            removed(folder / "out", folder / "job")
    return row("`recover`, one run : by way of a job", run, job, "≤ 1.03 of processor seconds")


def row(title: str, before: Side, after: Side, goal: str) -> str:
    cells = [title, f"{statistics.median(before.wall_s):.1f}", f"{statistics.median(after.wall_s):.1f}"]
    cells += [ratio(after.wall_s, before.wall_s), ratio(after.processor_s, before.processor_s), goal]
    return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Two workers of a thread each."""
    import distributed

    start: Any = distributed.LocalCluster

    with start(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit="4GiB"
    ) as made:
        yield made.scheduler_address


def dask_row(folder: Path, runs: int) -> str:
    """A merge by two threads, and by two Dask workers."""
    raw, tuned, out, job = (str(folder / name) for name in ("raw", "tuned", "out", "job"))
    line = [*COMMAND, "merge", raw, tuned, "--base", raw, "--method", "dare_ties", "--density", "0.5"]
    line += ["--weight", "0.5", "--weight", "0.5", "--max-shard-size", "100MB", "--quiet", "--out", out, "--job", job]
    threads, dask = Side(), Side()
    with cluster() as address:
        for turn in range(runs):
            for side in (threads, dask) if turn % 2 else (dask, threads):
                who = f"dask:{address}" if side is dask else "threads"
                side.run([*line, "--workers", "2", "--executor", who])
                removed(folder / "out", folder / "job")
    cells = ["`merge --method dare_ties`, two threads : two Dask workers"]
    cells += [f"{statistics.median(side.wall_s):.1f}" for side in (threads, dask)]
    return f"| {' | '.join([*cells, ratio(dask.wall_s, threads.wall_s), '', '≤ 1.10 of seconds'])} |"


def mixture_rows(folder: Path) -> Iterator[str]:
    sparse(folder / "source", mixture())
    source, out, job = (str(folder / name) for name in ("source", "out", "job"))
    for title, words, goal in (
        ("`shard --job`", (*LIGHT, PLAN, source, out, job), "≤ 400 MiB, 30 s"),
        ("", (*LIGHT, RECORDS, job), ""),
        ("`work`, before its first block", (*LIGHT, WORK, job, "100"), "≤ 100 MiB, 2 s"),
        ("`finish`", (*COMMAND, "finish", job, "--quiet"), "≤ 400 MiB, 30 s"),
    ):
        side = Side()
        side.run(words)
        if title:
            cells = [title, f"{side.wall_s[0]:.1f}", f"{side.processor_s[0]:.1f}", f"{side.rss_anon_mb[0]:.0f} MB"]
            yield f"| {' | '.join([*cells, goal])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-jobs"), help="on a disk with 12 GB")
    parser.add_argument("--only", choices=("door", "dask", "mixture"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    folder = options.folder.absolute()
    removed(folder)
    folder.mkdir(parents=True)
    lines, started = [], time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(removed, folder)
        if options.only in (None, "mixture"):
            lines += ["| 1T parameters, 138,492 tensors | seconds | of the processor | RssAnon peak | goal |"]
            lines += ["|---|---|---|---|---|", *mixture_rows(folder / "plan"), ""]
            removed(folder / "plan")
            print(*lines, sep="\n", flush=True)
        if options.only != "mixture":
            make(SHAPES["1b"], folder)
            raw, tuned, delta = (str(folder / name) for name in ("raw", "tuned", "diff"))
            weightops("diff", "--raw", raw, "--tuned", tuned, "--out", delta)
            head = ["1.1B parameters", "seconds before", "after", "ratio of wall: median (min to max)"]
            lines += [f"| {' | '.join([*head, 'of processor seconds', 'goal'])} |", "|---|---|---|---|---|---|"]
            if options.only != "dask":
                lines.append(door_row(folder, options.runs))
                print(lines[-1], flush=True)
            if options.only != "door":
                lines.append(dask_row(folder, options.runs // 3))
    head = ["## Jobs", "", f"Written by `make bench-jobs`: whole commands by turns, {options.runs} of `recover` and"]
    head += [f"{options.runs // 3} of the merge, on {os.cpu_count()} cores with a load of {load:.0f} from other work"]
    head += [
        "before the first. The mixture is headers and holes; its groups were not done, but noted as if they were.",
        "",
    ]
    print(*head, *lines, f"{time.monotonic() - started:.0f} s", sep="\n")
    if options.only is None:
        write_section(Path("docs/benchmarks.md"), "jobs", [*head, *lines])


if __name__ == "__main__":
    main()
