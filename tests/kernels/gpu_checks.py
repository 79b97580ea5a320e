"""What has to be true of the kernels on a device, as functions without a test framework: tests and `make gpu` run them.

Only torch, weightops_kernels and `gptq_layers` are imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from gptq_layers import random_layer, random_x, relative_error
from weightops_kernels import launch, layout
from weightops_kernels.configs import REDUCTIONS, Config
from weightops_kernels.linear import QuantLinear

DTYPES = (torch.float16, torch.bfloat16)
FORMATS = ((4, 128), (4, 32), (4, -1), (4, 100), (2, 64), (3, 128), (8, 128))
"""Bits and group sizes."""
SIZES = ((1, 512, 256), (17, 1000, 328), (130, 4096, 1024))
"""M, K, N: one row, sizes that are multiples of nothing, several tiles of each."""
SMALL = ((1, 256, 64), (5, 200, 72))
"""The same for an interpreter, which takes a second for what a GPU does in a microsecond."""

Check = Callable[[], object]


def sums_equal_float64(
    bits: int, group_size: int, dtype: torch.dtype, device: str, sizes: tuple[tuple[int, int, int], ...] = SIZES
) -> None:
    """Within 1e-5 and not 1e-6: the tensor cores of Hopper add products at less than float32's precision."""
    for (m, k, n), act_order in itertools.product(sizes, (False, True)):
        layer = random_layer(k, n, group_size, bits, act_order)
        weight = layout.repack(layer.packed.to(device))
        x = random_x(m, k).to(dtype)
        exact = x.double() @ layer.weight()
        for reduction, splits in itertools.product(REDUCTIONS, (1, 4)):
            out = torch.full((m, n), torch.nan, device=device)
            config = Config(16 if m <= 16 else 64, 128, splits, reduction=reduction)
            error = relative_error(launch.matmul(x.to(device), weight, config, out=out).cpu(), exact)
            assert error < 1e-5, f"{m} x {k} x {n}, act_order {act_order}, {config}: relative error {error:.2g}"


def every_seed_runs(dtype: torch.dtype, device: str, rows: tuple[int, ...] = (1, 16, 32, 64, 200, 512, 600)) -> None:
    """A layer as a user makes it, with the tile sizes that nobody has tuned."""
    layer = random_layer(1024, 512)
    module = QuantLinear.of(layer.packed.to(device)).prepare(dtype=dtype)
    assert module.engine == "triton" or device != "cuda", module.engine
    for m in rows:
        x = random_x(m, 1024).to(dtype)
        error = relative_error(module(x.to(device)).cpu(), x.double() @ layer.weight())
        assert error < (2e-3 if dtype == torch.float16 else 1.5e-2), f"{m} rows: relative error {error:.2g}"


def deterministic_sums_repeat(device: str, repeats: int = 20, k: int = 8192) -> None:
    """The same bits in every run, also where splits of K are added."""
    layer, x = random_layer(k, 512), random_x(4, k).to(device)
    weight = layout.repack(layer.packed.to(device))
    config = Config(16, 128, 16, reduction="atomic")
    results = [launch.matmul(x, weight, config, deterministic=True) for _ in range(repeats)]
    assert all(torch.equal(results[0], result) for result in results), "bits differ between runs"


def compiled_by_inductor(device: str) -> None:
    """One graph, the same bits as without."""
    layer, x = random_layer(512, 256, act_order=True), random_x(4, 512).to(device)
    module = QuantLinear.of(layer.packed.to(device)).prepare(deterministic=True)
    assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x)), "bits differ when compiled"


def all_checks(device: str) -> Iterator[tuple[str, Check]]:
    """Every check by name, the most telling first."""
    small = device != "cuda"
    sizes = SMALL if small else SIZES
    dtypes = DTYPES[:1] if small else DTYPES  # the interpreter computes bfloat16 wrongly
    for dtype in DTYPES:
        yield f"seeds, {dtype}", lambda d=dtype: every_seed_runs(d, device, (1, 16) if small else (1, 16, 64, 512))  # type: ignore[misc]
    for (bits, size), dtype in itertools.product(FORMATS, dtypes):
        yield (
            f"{bits} bits in groups of {size}, {dtype}",
            lambda b=bits, s=size, d=dtype: sums_equal_float64(b, s, d, device, sizes),  # type: ignore[misc]
        )
    yield "deterministic", lambda: deterministic_sums_repeat(device, 2 if small else 20, 1024 if small else 8192)
    if not small:
        yield "torch.compile", lambda: compiled_by_inductor(device)
