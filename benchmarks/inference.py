"""Speed and memory of generating from quantised weights, dequantised and packed: `make bench-inference`.

Every run is a process of its own, on a random model of 1.1B parameters' shape, rounded to 4 bits in groups of 128. The
second table is one layer on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import timed, weightops, write_section
from quantize import model_of, shown
from weightops_kernels.reference import Packed

from weightops import api
from weightops.inference.events import Token

PROMPT = "In the beginning was the Word, and the Word was with God, and the Word was God."
CASES = (
    ("dequantized", "float32"),
    ("dequantized", "bfloat16"),
    ("packed", "float32"),
    ("packed", "bfloat16"),
)
# As the command line sets it, before torch is imported.
ENVIRONMENT = ("env", "OMP_WAIT_POLICY=passive", "GOMP_SPINCOUNT=10000")
SIZE, ROWS = 4096, (1, 4, 16, 64, 256)


def one(folder: Path, engine: str, dtype: str, tokens: int, out: Path) -> None:
    """Generate, and write the seconds until the first token, and of each further one at the median."""

    start = time.perf_counter()
    found = api.generate(folder, PROMPT, max_new_tokens=tokens, engine=engine, dtype=dtype, device="cpu")
    # Not the text: a random model says what its tokenizer does not know.
    times = [time.perf_counter() for event in found.events() if isinstance(event, Token)]
    steps = [b - a for a, b in itertools.pairwise(times)]
    document = {"first_s": times[0] - start, "token_s": statistics.median(steps), "whole_nbytes": found.whole_nbytes}
    out.write_text(json.dumps(document), encoding="utf-8")


def generating(size: str, folder: Path, runs: int, tokens: int) -> list[str]:
    source = quantised(size, folder)
    figures: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {case: [] for case in CASES}
    out = folder / "one.json"
    for _ in range(runs):
        for case in CASES:
            script = (sys.executable, __file__, "--one", *case, "--tokens", str(tokens), "--folder", str(source))
            _, peak_mb = timed([*ENVIRONMENT, *script, "--report", str(out)])
            found = json.loads(out.read_text())
            figures[case].append((found["first_s"], found["token_s"], found["whole_nbytes"] / 1e6, peak_mb))
    out.unlink()
    lines = [
        "| weights | computes in | first token, seconds | a token, ms: median (min to max) | model, MB | RssAnon, MB |",
        "|---|---|---|---|---|---|",
    ]
    for (engine, dtype), rows in figures.items():
        first, token, whole, peak = zip(*rows, strict=True)
        lines.append(
            f"| `{engine}` | {dtype} | {statistics.median(first):.1f} | **{1e3 * statistics.median(token):.0f}** "
            f"({1e3 * min(token):.0f} to {1e3 * max(token):.0f}) | {whole[0]:.0f} | {max(peak):.0f} |"
        )
    return lines


def quantised(size: str, folder: Path) -> Path:
    """The model of this size, rounded to 4 bits."""
    source = model_of(size, folder)
    out = source.with_name("rtn4")
    if not out.exists():
        weightops("quantize", str(source), "--out", str(out), "--method", "rtn", "--no-mse", "--device", "cpu")
    return out


def layer() -> list[str]:
    """Milliseconds of a layer of 4096 x 4096 on one core, for so many rows of x."""
    import torch
    from torch.nn import functional as F
    from weightops_kernels import reference
    from weightops_kernels.linear import QuantLinear

    torch.set_num_threads(1)
    torch.manual_seed(0)
    q = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (SIZE // 128, SIZE), dtype=torch.uint8)
    scales = (torch.rand(SIZE // 128, SIZE) * 0.02 + 0.001).half()
    tensors = (
        reference.pack(q, 4),
        reference.pack(zeros.t().contiguous(), 4).t().contiguous(),
        scales,
        reference.trivial_g_idx(SIZE, 128),
    )
    dense = reference.dequantize(Packed(*tensors)).contiguous()
    narrow = dense.bfloat16()
    int4 = QuantLinear.from_tensors(*tensors, 4).prepare("cpu-int4", torch.bfloat16, release=True)
    planes = QuantLinear.from_tensors(*tensors, 4).prepare("cpu", release=True)
    ways: list[tuple[str, torch.dtype, Callable[[torch.Tensor], torch.Tensor]]] = [
        ("`cpu-int4`, bfloat16", torch.bfloat16, int4),
        ("`cpu`, bfloat16", torch.bfloat16, planes),
        ("dense bfloat16", torch.bfloat16, lambda x: F.linear(x, narrow)),
        ("`cpu`, float32", torch.float32, planes),
        ("dense float32", torch.float32, lambda x: F.linear(x, dense)),
    ]
    lines = ["| rows of x | " + " | ".join(name for name, _, _ in ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for rows in ROWS:
        x = torch.randn(rows, SIZE)
        cells = [f"{1e3 * _best(way, x.to(dtype)):.1f}" for _, dtype, way in ways]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return lines


def _best(way: Callable[..., object], x: object) -> float:
    """Processor seconds, the least of seven: others may use the machine too."""
    way(x)
    seconds = []
    for _ in range(7):
        start = time.process_time()
        way(x)
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.folder, *options.one, options.tokens, options.report)
        return
    import torch

    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    capability, cores = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    lines = [
        "## Running quantised models",
        "",
        f"Written by `make bench-inference`: `weightops generate` from 4 bits, groups of 128, {shown(options.size)}, "
        f"{options.tokens} tokens after a prompt, {options.runs} runs of each by turns, {cores} cores with "
        f"{capability}. Embedding and head, which are not quantised, are in every row.",
        "",
        *generating(options.size, options.folder, options.runs, options.tokens),
        "",
        f"One layer of {SIZE} x {SIZE} on one core, milliseconds of processor time, the least of seven:",
        "",
        *layer(),
    ]
    print("\n".join(lines), flush=True)
    write_section(options.report, "inference", lines)


if __name__ == "__main__":
    main()
