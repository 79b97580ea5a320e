"""Packing a layer beside auto-gptq's loop, for bench-quantize.

auto-gptq's `pack` is given weights on their grid, finds the integers row by row, and packs them row by row. Ours is
timed for both steps, and for packing the integers alone, which is all that is left to do after GPTQ.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from weightops.formats.gptq import write_module
from weightops.ops.gptq import Settings, dequantized, round_to_nearest
from weightops.ops.gptq_grid import levels

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
layer = QuantLinear(4, inputs // len(scales), inputs, outputs, bias=False)
begin = time.perf_counter()
layer.pack(linear, scales.T, zeros.T, g_idx)
print(time.perf_counter() - begin)
np.save(sys.argv[2], layer.qweight.numpy())
"""


def packing(sizes: list[tuple[int, int]], runs: int) -> list[str]:
    """Lines of the report, for layers of so many outputs and inputs."""
    lines = [
        "| outputs x inputs | auto-gptq's loop | both steps | times as fast | packing alone | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for outputs, inputs in sizes:
        _once(256, 256)
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
