"""Speed and memory of `weightops convert`: `make bench-convert`, to docs/benchmarks.md between the marking lines.

Against `cp` of as many bytes, against the converter of transformers 4.47.1 on the same files, and against the
quantise calls of the gguf package on the same tensors, by turns.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import SHARD, WEIGHTOPS, Job, measure, table, timed, warm_cache, write_section
from family import SHAPES, make

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / ".venv-reference/bin/python"
SCRIPT = ROOT / "tests/reference_converter.py"
QUANTISE = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors import safe_open

kind, threads, elapsed_s = GGMLQuantizationType[sys.argv[2]], os.cpu_count(), 0.0
with ThreadPoolExecutor(threads) as pool:
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if tensor.ndim == 2:
                    parts = np.array_split(tensor.astype(np.float32), threads)
                    start = time.perf_counter()
                    list(pool.map(lambda part: quantize(part, kind), parts))
                    elapsed_s += time.perf_counter() - start
print(elapsed_s)
"""


def sentencepiece(count: int) -> bytes:
    """A tokenizer.model with so many tokens, as protobuf has it; what is in them does not matter here."""

    def message(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    def piece(text: str, score: float, kind: int) -> bytes:
        return message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))

    pieces = [piece(text, 0, kind) for text, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3))]
    pieces += [piece(f"<0x{i:02X}>", 0, 6) for i in range(256)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c + d for a in letters for b in letters for c in letters for d in letters]
    pieces += [piece(word, -i, 1) for i, word in enumerate([*letters, *words][: count - len(pieces)])]
    return b"".join(pieces) + message(2, bytes([0x18, 2, 0x98, 0x02, 1])) + message(3, bytes([0x18, 1, 0x20, 0]))


def prepare(size: str, folder: Path) -> tuple[Path, Path]:
    """The family's raw model as transformers has it, and in Meta's layout in two parts."""
    raw, meta = folder / "raw", folder / "meta"
    if not (raw / "config.json").exists():
        make(SHAPES[size], folder)
    (raw / "tokenizer.model").write_bytes(sentencepiece(SHAPES[size].vocab))
    if not meta.exists():
        arguments = ("convert", str(raw), "--to", "meta", "--model-parallel", "2", "--out", str(meta), "--quiet")
        subprocess.run([WEIGHTOPS, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return raw, meta


def jobs(size: str, folder: Path) -> list[Job]:
    raw, meta = prepare(size, folder)

    def convert(name: str, source: Path, to: str, goal: float | None, *more: str) -> Job:
        out = ("--out", str(folder / "out"), "--quiet")
        arguments = ("convert", str(source), "--to", to, "--set", "context_length=2048", *out, *more)
        return Job(name, arguments, (source,), raw, goal)

    return [
        convert("meta, 2 parts → hf", meta, "hf", 1.0 if size == "3b" else None, "--max-shard-size", SHARD),
        convert("hf → meta, 2 parts", raw, "meta", None, "--model-parallel", "2"),
        convert("meta, 2 parts → meta, 8 parts", meta, "meta", None, "--model-parallel", "8"),
        convert("hf → tencentpretrain", raw, "tencentpretrain", None, "--max-shard-size", SHARD),
        convert("meta, 2 parts → gguf", meta, "gguf", None),
    ]


def against(name: str, ours: Sequence[str], theirs: Sequence[str], out: Path, runs: int, inner: bool) -> str:
    """A row: seconds of both, by turns; with `inner`, the other side prints its own."""
    ratios, seconds, others = [], [], []
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        seconds.append(timed([WEIGHTOPS, *ours])[0])
        shutil.rmtree(out, ignore_errors=True)
        if inner:
            others.append(float(subprocess.run(theirs, check=True, capture_output=True, text=True).stdout))
        else:
            others.append(timed(theirs)[0])
        ratios.append(others[-1] / seconds[-1])
    shutil.rmtree(out, ignore_errors=True)
    spread = f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {name} | {statistics.median(seconds):.2f} | {statistics.median(others):.2f} | {spread} |"


def peers(size: str, folder: Path, runs: int) -> list[str]:
    raw, meta = prepare(size, folder)
    out, params = folder / "out", ("--set", "context_length=2048", "--quiet")
    rows = []
    for kind in ("Q4_0", "Q8_0"):
        warm_cache([raw, meta])
        ours = ("convert", str(meta), "--to", "gguf", "--dtype", kind, "--out", str(out), *params)
        theirs = (sys.executable, "-c", QUANTISE, str(raw), kind)
        name = f"{size}: meta → gguf {kind}, against the quantise calls alone of gguf, on all cores"
        rows.append(against(name, ours, theirs, out, runs, inner=True))
    if REFERENCE.exists():
        warm_cache([raw, meta])
        ours = ("convert", str(meta), "--to", "hf", "--out", str(out), *params)
        theirs = (str(REFERENCE), str(SCRIPT), str(meta), str(out))
        name = f"{size}: meta → hf, against transformers 4.47.1"
        rows.append(against(name, ours, theirs, out, min(runs, 3), inner=False))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,3b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    how = f"Written by `make bench-convert`: {options.runs} runs of each by turns, warm cache."
    lines = ["## convert", "", how]
    compared: list[str] = []
    for size in options.sizes.split(","):
        folder = options.folder / size
        figures = [measure(job, folder, options.runs, warm_cache) for job in jobs(size, folder)]
        count = sum(math.prod(shape) for _, shape in SHAPES[size].tensors())
        title = f"### {count / 1e9:.1f}B parameters, fp16, against `cp` of as many bytes"
        lines += ["", title, "", *table(figures, True)]
        print(*lines, sep="\n", flush=True)
        compared += peers(size, folder, options.runs)
        print(*compared, sep="\n", flush=True)
    lines += ["", "### Against other converters", ""]
    lines += ["| job | seconds | the other's seconds | times as fast: median (min to max) |", "|---|---|---|---|"]
    lines += compared
    write_section(options.report, "convert", lines)


if __name__ == "__main__":
    main()
