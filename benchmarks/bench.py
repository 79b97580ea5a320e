"""Speed and memory of whole commands against `cp` of the same bytes: `make bench`, figures to docs/benchmarks.md.

Command and baseline alternate, so that both see the same machine; every run is timed as a whole process, imports
included, with its output on disk at the end (`sync`). Peak memory is RssAnon: what a process really holds, page
cache left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from family import SHAPES, make

NOTES = """## Reading them

- `cp` writes through the page cache, where the kernel's buffered write costs more than most of what weightops does;
  weightops writes past it into preallocated files, at what the disk takes. Where the disk is slower by far than the
  processor, expect ratios nearer to 1.
- With a cold cache both sides wait for the disk to read.
- The arithmetic is torch's, called without importing torch, which alone would add the last line above.
- A download with a digest waits for SHA-256 once the network is as fast as loopback: 1.5 GB/s of one core. Several
  connections for one file come into play only where that is not the limit.
- Conversion to Meta's layout takes the MD5 of every file for checklist.chk, one core's work. Columns are cut from whole
  rows, so 8 parts read those matrices 8 times, from the page cache.
- verify is timed as a whole process, its start included, against tools that start in a millisecond.
"""
WEIGHTOPS = str(Path(sys.executable).with_name("weightops"))
SHARD = "500MB"


@dataclass(frozen=True)
class Job:
    """A command, what it reads and writes, and the files that `cp` copies for comparison."""

    name: str
    arguments: tuple[str, ...]
    reads: tuple[Path, ...]
    copies: Path | None
    target: float | None = None


@dataclass
class Figures:
    """Seconds of each run of a job, of its baseline and of the disk alone, and the job's peak memory."""

    job: Job
    seconds: list[float] = field(default_factory=list)
    baseline_s: list[float] = field(default_factory=list)
    disk_s: list[float] = field(default_factory=list)
    rss_anon_mb: float = 0.0

    @property
    def ratio(self) -> str:
        return ratio(self.seconds, self.baseline_s)

    @property
    def disk_ratio(self) -> str:
        return ratio(self.seconds, self.disk_s)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of runs that were next to each other: the median, and from the least to the greatest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def timed(arguments: Sequence[str]) -> tuple[float, float]:
    """Wall seconds up to the output being on disk, and peak RssAnon in MB."""
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            for line in status.read_text(encoding="utf-8").splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]))
        except (OSError, IndexError):
            pass
        time.sleep(0.02)
    os.sync()
    elapsed = time.perf_counter() - start
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(f"{' '.join(arguments)} failed:\n{process.stderr.read().decode()}")
    return elapsed, peak / 1000


def files(folders: Sequence[Path]) -> list[Path]:
    return [p for folder in folders for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pth")]


def drop_cache(folders: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for path in files(folders):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(folders: Sequence[Path]) -> None:
    subprocess.run(["cat", *map(str, files(folders))], stdout=subprocess.DEVNULL, check=True)


def baseline(job: Job, scratch: Path) -> list[str]:
    """`cat` of the inputs, and `cp` of as many bytes as the job writes."""
    script = f"cat {' '.join(map(str, files(job.reads)))} > /dev/null"
    if job.copies:
        script += f"; mkdir {scratch}; cp {' '.join(map(str, files([job.copies])))} {scratch}/; sync"
    return ["sh", "-c", script]


def measure(job: Job, folder: Path, runs: int, prepare: Callable[[Sequence[Path]], None]) -> Figures:
    figures = Figures(job)
    out, scratch = folder / "out", folder / "copy"
    for _ in range(runs):
        for side in ("job", "baseline", "disk"):
            for path in (out, scratch):
                shutil.rmtree(path, ignore_errors=True)
            if side == "disk":
                figures.disk_s += [disk_alone(job, folder, prepare)] if job.copies else []
                continue
            os.sync()
            prepare([*job.reads, *([job.copies] if job.copies and side == "baseline" else [])])
            if side == "job":
                seconds, memory = timed([WEIGHTOPS, *job.arguments])
                figures.seconds.append(seconds)
                figures.rss_anon_mb = max(figures.rss_anon_mb, memory)
            else:
                figures.baseline_s.append(timed(baseline(job, scratch))[0])
    for path in (out, scratch):
        shutil.rmtree(path, ignore_errors=True)
    return figures


def disk_alone(job: Job, folder: Path, prepare: Callable[[Sequence[Path]], None]) -> float:
    """What the disk itself needs: the longer of reading the inputs, unless they are cached, and writing the output.

    Both past the page cache, and at the same time on a disk that can.
    """
    assert job.copies is not None
    nbytes = sum(path.stat().st_size for path in files([job.copies]))
    seconds = [write_alone(folder / "disk-alone", nbytes)]
    if prepare is drop_cache:
        prepare(job.reads)
        read = (
            f"for file in {' '.join(map(str, files(job.reads)))}; do dd if=$file of=/dev/null bs=4M iflag=direct; done"
        )
        start = time.perf_counter()
        subprocess.run(["sh", "-c", read], check=True, stderr=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return max(seconds)


def write_alone(path: Path, nbytes: int) -> float:
    """Seconds of `dd` past the page cache into a preallocated file."""
    count = -(-nbytes // (4 << 20))
    subprocess.run(["fallocate", "-l", str(count * (4 << 20)), str(path)], check=True)
    os.sync()
    arguments = ["dd", "if=/dev/zero", f"of={path}", "bs=4M", f"count={count}", "oflag=direct", "conv=notrunc,fsync"]
    start = time.perf_counter()
    subprocess.run(arguments, check=True, stderr=subprocess.DEVNULL)
    elapsed_s = time.perf_counter() - start
    path.unlink()
    return elapsed_s


def weightops(*arguments: str) -> None:
    subprocess.run([WEIGHTOPS, *arguments, "--quiet", "--max-shard-size", SHARD], check=True, stdout=subprocess.DEVNULL)


def jobs(size: str, folder: Path) -> list[Job]:
    """The family's jobs; makes what they read."""
    raw, tuned = folder / "raw", folder / "tuned"
    diff16, diff32, exact = folder / "diff-fp16", folder / "diff-fp32", folder / "delta"
    raw_bin, diff_bin = folder / "raw-bin", folder / "diff-fp16-bin"
    if not (raw / "config.json").exists():
        make(SHAPES[size], folder)
    pair = ("--raw", str(raw), "--tuned", str(tuned))
    subtract = ("--method", "subtract", "--dtype", "float16")
    for path, arguments in (
        (diff16, ("diff", *pair, *subtract)),
        (diff32, ("diff", *pair, "--method", "subtract")),
        (exact, ("diff", *pair)),
        (raw_bin, ("shard", str(raw), "--format", "torch-1.12")),
        (diff_bin, ("shard", str(diff16), "--format", "torch-1.12")),
    ):
        if not path.exists():
            weightops(*arguments, "--out", str(path))
    out = ("--out", str(folder / "out"), "--quiet", "--max-shard-size", SHARD)

    def recover(name: str, base: Path, diff: Path, target: float | None, *more: str) -> Job:
        arguments = ("recover", "--raw", str(base), "--diff", str(diff), *out, *more)
        return Job(name, arguments, (base, diff), diff, target)

    goals = {"1b": (2.0, None, None, None), "3b": (0.8, 1.0, 0.7, 0.7)}.get(size, (None,) * 4)
    return [
        recover("recover, fp16 diff", raw, diff16, goals[0]),
        recover("recover, fp32 diff", raw, diff32, goals[1]),
        recover("recover, exact delta", raw, exact, goals[2]),
        recover("recover, fp16 .bin to .bin", raw_bin, diff_bin, None, "--format", "torch-1.12"),
        Job("diff, exact", ("diff", *pair, *out), (raw, tuned), tuned),
        Job(
            "diff, subtract fp16",
            ("diff", *pair, *out, "--method", "subtract", "--dtype", "float16"),
            (raw, tuned),
            tuned,
        ),
        Job("shard", ("shard", str(raw), *out), (raw,), raw, goals[3]),
    ]


def table(figures: Sequence[Figures], goals: bool) -> list[str]:
    lines = [
        "| job | seconds | cp, seconds | ratio: median (min to max) | goal | to the disk alone | RssAnon peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in figures:
        goal = f"≤ {f.job.target}" if goals and f.job.target else ""
        lines.append(
            f"| {f.job.name} | {statistics.median(f.seconds):.2f} | {statistics.median(f.baseline_s):.2f} "
            f"| {f.ratio} | {goal} | {f.disk_ratio} | {f.rss_anon_mb:.0f} MB |"
        )
    return lines


def verify_table(folder: Path, runs: int) -> list[str]:
    """verify against the tools that do the same, on two files at a time where a tool takes one."""
    raw = folder / "raw"
    names = [p.name for p in files([raw])]
    nbytes = sum(p.stat().st_size for p in files([raw]))
    lists = {}
    for option, tool in (("--md5sums", "md5sum"), ("--sha256sums", "sha256sum"), ("--xxh128sums", "")):
        lists[tool] = folder / f"list{option}.{option.strip('-').removesuffix('sums').replace('xxh128', 'xxh128')}"
        text = subprocess.run(
            [WEIGHTOPS, "manifest", str(raw), option], check=True, capture_output=True, text=True
        ).stdout
        lists[tool].write_text("".join(line + "\n" for line in text.splitlines() if line.split("  ")[1] in names))
    lines = [
        "| digest | weightops verify | tool, `xargs -P2` | openssl, `xargs -P2` | of openssl |",
        "|---|---|---|---|---|",
    ]
    for tool, digest in (("md5sum", "md5"), ("sha256sum", "sha256"), ("", "xxh3_128")):
        ours, theirs, openssl = [], [], []
        paths = " ".join(str(p) for p in files([raw]))
        for _ in range(runs):
            warm_cache([raw])
            ours.append(timed([WEIGHTOPS, "verify", str(raw), "--manifest", str(lists[tool]), "--quiet"])[0])
            if tool:
                theirs.append(timed(["sh", "-c", f"echo {paths} | xargs -n1 -P2 {tool}"])[0])
                openssl.append(timed(["sh", "-c", f"echo {paths} | xargs -n1 -P2 openssl dgst -{digest}"])[0])
            else:
                theirs.append(timed(["sh", "-c", f"cat {paths} > /dev/null"])[0])

        def rate(seconds: list[float]) -> str:
            return f"{nbytes / statistics.median(seconds) / 1e9:.2f} GB/s" if seconds else ""

        share = f"{statistics.median(b / a for a, b in zip(ours, openssl, strict=True)):.2f}" if openssl else ""
        other = f"{rate(theirs)} ({tool or 'cat, one core'})"
        lines.append(f"| {digest} | {rate(ours)} | {other} | {rate(openssl)} | {share} |")
    return lines


def disk_speed(folder: Path) -> str:
    """GB/s of writing alone: what no durable output can be faster than."""
    rates = [(4 << 30) / write_alone(folder / "disk-alone", 4 << 30) / 1e9 for _ in range(3)]
    return f"{statistics.median(rates):.2f} GB/s ({min(rates):.2f} to {max(rates):.2f})"


def start_up(runs: int) -> list[str]:
    """Seconds until a command that does next to nothing is done."""
    lines = ["| command | median | min to max |", "|---|---|---|"]
    for arguments in ([WEIGHTOPS, "--help"], [WEIGHTOPS, "recover", "--help"], [sys.executable, "-c", "import torch"]):
        seconds = []
        for _ in range(runs * 2):
            start = time.perf_counter()
            subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        name = " ".join([Path(arguments[0]).name, *arguments[1:]])
        lines.append(f"| `{name}` | {statistics.median(seconds):.2f} s | {min(seconds):.2f} to {max(seconds):.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,3b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--only", help="jobs whose name contains this")
    parser.add_argument("--keep", action="store_true", help="keep the families for the next time")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    speed = disk_speed(options.folder)
    sections = []
    for size in options.sizes.split(","):
        folder = options.folder / size
        chosen = [job for job in jobs(size, folder) if not options.only or options.only in job.name]
        cold_runs = options.runs // 2 + 1
        for prepare, title, runs in (
            (warm_cache, "page cache warm", options.runs),
            (drop_cache, "page cache cold", cold_runs),
        ):
            results = [measure(job, folder, runs, prepare) for job in chosen]
            sections += [f"## {size}: {title}", "", *table(results, prepare is warm_cache), ""]
            print("\n".join(sections[-len(results) - 5 :]), flush=True)
        if not options.only:
            sections += [f"## {size}: verify", "", *verify_table(folder, options.runs), ""]
            print("\n".join(sections[-8:]), flush=True)
        if not options.keep:
            shutil.rmtree(folder)
    if not options.only:
        sections += ["## Start-up", "", *start_up(options.runs), ""]
        options.report.write_text("\n".join([_preamble(options.runs, speed), *sections, NOTES]))


def write_section(report: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines into the report, in place of those between the marks of this name, or else before the notes."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = report.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    if not rest:
        before, heading, after = before.partition("## Reading them")
        after = f"\n\n{heading}{after}"
    report.write_text("\n".join([before + begin, *lines, "", end]) + after, encoding="utf-8")


def _preamble(runs: int, speed: str) -> str:
    return f"""# Benchmarks

How fast weightops is, and how much memory it takes, against `cp` and against other programs.

Written by `make bench`: {runs} runs ({runs // 2 + 1} with a cold cache) of a whole command and of its baseline,
by turns, on {os.cpu_count()} cores ({platform.machine()}). The baseline is `cat` of every input, `cp` of as many bytes
as the command writes, and `sync`. Take the ratios; the seconds are this machine's.

The disk takes {speed} from `dd` with O_DIRECT, the median of three before the first run; "to the
disk alone" is the ratio to what `dd` needs for as many bytes in the next turn (with a cold cache, to the longer of
reading and writing). That is the floor of everything that writes: a command is done no sooner than its output is
on disk.
"""


if __name__ == "__main__":
    main()
