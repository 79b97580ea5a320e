"""Measure configs of the four-bit kernel on this machine's GPU and write the best: `python -m weightops_kernels.tune`.

Prints, for each shape and number of rows, the best config beside float16 (cuBLAS), torch's tinygemm operator, and
gemlite where it is installed; writes the table that `configs.load` reads.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from weightops_kernels import configs, launch, layout, reference, timing
from weightops_kernels.configs import Config, Key
from weightops_kernels.reference import Packed

SHAPES = "8192x28672,4096x11008"
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def candidates(m: int, k: int, *, few: bool = False) -> Iterator[Config]:
    """Every config worth a measurement for `m` rows of `k`; or a `few`, since each takes a second to be compiled."""
    if m >= 64:
        yield Config(dequantize=True)
    tiles_m = [16] if m <= 16 else [16, 32] if m <= 32 else [32, 64] if m <= 64 else [64, 128]
    splits = [s for s in (1, 2, 4, 8, 16, 32) if s <= -(-k // layout.BLOCK_K) and (m <= 128 or s <= 2)]
    widths, warp_counts, depths, ways = (64, 128, 256), (4, 8), (3, 4), configs.REDUCTIONS
    if few:
        tiles_m, widths, warp_counts, depths, ways = tiles_m[-1:], (64, 128), (4,), (4,), ("two_pass",)
        splits = [split for split in splits if split in (1, 4, 8)]
    for block_m, block_n, split, warps, stages in itertools.product(tiles_m, widths, splits, warp_counts, depths):
        for reduction in ways if split > 1 else ("two_pass",):
            yield Config(block_m, block_n, split, warps, stages, reduction)


def random_layer(k: int, n: int, group_size: int, seed: int = 0) -> Packed:
    """A layer of random four-bit integers on the GPU."""
    made = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    q = torch.randint(0, 16, (k, n), generator=made, dtype=torch.uint8)
    zeros = torch.randint(1, 16, (n, groups), generator=made, dtype=torch.uint8)
    scales = (torch.rand(groups, n, generator=made) * 0.01 + 0.001).half()
    packed = reference.pack(q, 4), reference.pack(zeros - 1, 4).t().contiguous(), scales
    qweight, qzeros, scales = (t.cuda() for t in packed)
    return Packed(qweight, qzeros, scales, reference.trivial_g_idx(k, group_size, qweight.device))


def best(x: Tensor, weight: layout.Repacked, *, few: bool = False) -> tuple[Config, float]:
    """The fastest config and its microseconds. Configs that the GPU cannot run are left out, and said."""
    found: list[tuple[float, Config]] = []
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    for config in candidates(x.shape[0], weight.in_features, few=few):
        try:
            # mypy infers no lambda with defaults
            found.append((timing.time_us(lambda c=config: launch.matmul(x, weight, c, out=out), 7), config))  # type: ignore[misc]
        except Exception as error:  # Triton and the driver refuse a config by errors of many kinds
            sys.stderr.write(f"left out {config}: {type(error).__name__}: {str(error).splitlines()[0]}\n")
    time, config = min(found, key=lambda pair: pair[0])
    return config, time


def rivals(x: Tensor, layer: Packed, group_size: int) -> dict[str, Callable[[], object]]:
    """What the kernel is held against, as functions to time."""
    dense = reference.dequantize(layer, torch.float16)
    found: dict[str, Callable[[], object]] = {"fp16": lambda: torch.nn.functional.linear(x, dense)}
    if group_size not in (32, 64, 128, 256):  # the others take no group of another length
        return found
    q = reference.integers(layer.qweight, 4, x.shape[1]).t().to(torch.int32)
    nibbles = ((q[:, ::2] << 4) | q[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles.contiguous(), 8)
    zeros = layer.zero_points()
    scales = layer.scales.bfloat16()
    pairs = torch.stack([scales, (8.0 - zeros.float()).mul(scales.float()).bfloat16()], -1).contiguous()
    wide = x.bfloat16()
    found["tinygemm"] = lambda: torch.ops.aten._weight_int4pack_mm(wide, packed, group_size, pairs)
    try:
        from gemlite.core import DType, GemLiteLinear
    except ImportError:
        return found
    other = GemLiteLinear(
        4,
        group_size=group_size,
        in_features=x.shape[1],
        out_features=dense.shape[0],
        input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )
    other.pack(q.to(torch.uint8), layer.scales.t().contiguous(), zeros.t().contiguous().half(), None)
    found["gemlite"] = lambda: other(x)
    return found


def wrong(x: Tensor, found: object, layer: Packed) -> bool:
    """Whether a result is further from the reference than bfloat16 explains: such a time says nothing."""
    exact = reference.matmul(x.float(), layer)
    return not isinstance(found, Tensor) or float((found.float() - exact).abs().max() / exact.abs().max()) > 0.02


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m weightops_kernels.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table to write; entries it has are kept")
    parser.add_argument("--shapes", default=SHAPES, help=f"K x N of layers, separated by commas ({SHAPES})")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x to tune for")
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "tune needs a CUDA GPU, and torch finds none.\n")
    if reason := launch.available():
        parser.exit(2, f"{reason}\n")
    table = configs.read_table(options.out) if options.out.exists() else {}
    device = torch.cuda.get_device_name()
    bandwidth = timing.copy_bandwidth()
    sys.stdout.write(f"{device}, copy {bandwidth / 1e12:.2f} TB/s; microseconds, L2 flushed, CUDA graphs\n")
    for shape in options.shapes.split(","):
        k, n = (int(side) for side in shape.split("x"))
        layer = random_layer(k, n, options.group_size)
        weight = layout.repack(layer)
        for m in (int(rows) for rows in options.rows.split(",")):
            x = torch.randn(m, k, dtype=torch.float16, device="cuda")
            config, time = best(x, weight)
            # mypy infers no lambda with defaults
            time = timing.time_us(lambda c=config, x=x, w=weight: launch.matmul(x, w, c))  # type: ignore[misc]
            key = Key(device, configs.bucket(m), n, k, weight.group_size)
            table[str(key)] = config
            moved = (weight.nbytes + 2 * m * (k + n)) / (time * 1e-6) / bandwidth
            line = [f"{shape} M={m}: {time:.1f} ({moved:.0%} of copy)"]
            for name, function in rivals(x, layer, options.group_size).items():
                if wrong(x, function(), layer):
                    line.append(f"{name} gives another result")
                    continue
                other = timing.time_us(function)
                line.append(f"{name} {other:.1f} ({other / time:.2f}x)")
            sys.stdout.write(", ".join(line) + f"; {config}\n")
            sys.stdout.flush()
            configs.write_table(options.out, table)


if __name__ == "__main__":
    main()
