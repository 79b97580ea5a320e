"""Packing a layer beside auto-gptq's loop: part of `make bench-quantize`.

auto-gptq's `pack` is given weights on their grid, finds the integers row by row, and packs them row by row. Ours is
timed for both steps, and for packing the integers alone, which is all that is left to do after GPTQ. Each is timed on a
second layer of a size: a model has hundreds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# As on the command line, before torch is imported.
os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}

import numpy as np
import torch
from bench import write_section

from weightops.formats.quantized.gptq import write_module
from weightops.ops.gptq.grid import levels
from weightops.ops.gptq.solver import Settings, dequantized, round_to_nearest

PEER = Path(__file__).parents[1] / ".venv-autogptq/bin/python"
GROUP = 128
AS_IT_IS = ["env", "-u", "OMP_WAIT_POLICY", "-u", "GOMP_SPINCOUNT"]
"""Before a peer's command: what we set for ourselves is not set for it."""
SCRIPT = """
import sys, time
import numpy as np
import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

given = np.load(sys.argv[1])
weight, scales, zeros, g_idx = (torch.from_numpy(given[name]) for name in ("weight", "scales", "zeros", "g_idx"))
outputs, inputs = weight.shape
linear = torch.nn.Linear(inputs, outputs, bias=False)
linear.weight.data = weight
for _ in range(2):
    layer = QuantLinear(4, inputs // len(scales), inputs, outputs, bias=False)
    begin = time.perf_counter()
    layer.pack(linear, scales.T, zeros.clone().T, g_idx)  # which changes the zeros
    elapsed_s = time.perf_counter() - begin
print(elapsed_s)
np.save(sys.argv[2], layer.qweight.numpy())
"""


def packing(sizes: list[tuple[int, int]], runs: int) -> list[str]:
    """Lines of the report, for layers of so many outputs and inputs."""
    lines = [
        "| outputs x inputs | auto-gptq's loop | both steps | times as fast | packing alone | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for outputs, inputs in sizes:
        rounds = [_once(outputs, inputs) for _ in range(runs)]
        theirs, *ours = zip(*rounds, strict=True)
        cells = [f"{outputs} x {inputs}", f"{statistics.median(theirs):.2f} s"]
        for mine in ours:
            ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
            cells.append(f"{1000 * statistics.median(mine):.0f} ms")
            cells.append(f"**{statistics.median(ratios):.0f}** ({min(ratios):.0f} to {max(ratios):.0f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _once(outputs: int, inputs: int) -> tuple[float, float, float]:
    """Seconds: auto-gptq's, ours, and ours of packing alone."""
    solved = round_to_nearest(torch.randn(outputs, inputs) * 0.02, Settings(mse=False))
    # What lies on the grid already: there the loop, which rounds sums and not quotients, finds the same integers.
    weight, scales, zeros = dequantized(solved).contiguous(), solved.scales.float(), solved.zeros.float()
    g_idx = solved.g_idx
    for _ in range(2):
        begin = time.perf_counter()
        q = torch.empty(inputs, outputs, dtype=torch.uint8)
        for group in range(len(scales)):
            part = slice(group * GROUP, (group + 1) * GROUP)
            q[part] = levels(weight[:, part].T, scales[group], zeros[group], 15)
        rounded_s = time.perf_counter() - begin
        packed = write_module("layer", q.numpy(), zeros.byte().numpy(), scales.half().numpy(), g_idx.numpy(), None, 4)
        elapsed_s = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.npz", Path(folder) / "made.npy"
        np.savez(given, weight=weight, scales=scales, zeros=zeros, g_idx=g_idx)
        command = [*AS_IT_IS, str(PEER), "-c", SCRIPT, str(given), str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        if not np.array_equal(np.load(made), packed["layer.qweight"]):
            raise SystemExit("auto-gptq packs other integers")
    return float(done.stdout.split()[-1]), elapsed_s, elapsed_s - rounded_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    if not PEER.exists():
        sys.exit("`make autogptq` first")
    lines = [
        "### Packing",
        "",
        "Written by `make bench-quantize`: weights on their grids of 4 bits, groups of 128, to `qweight` and `qzeros`, "
        f"{options.runs} runs. auto-gptq 0.7.1's `pack` finds the integers row by row and packs them row by row; ours "
        "does both steps, or packs integers, which is all that is left to do after GPTQ. A second layer each, CPU.",
        "",
        *packing([(4096, 4096), (4096, 11008)], options.runs),
    ]
    print("\n".join(lines[4:]), flush=True)
    write_section(options.report, "packing", lines)


if __name__ == "__main__":
    main()
