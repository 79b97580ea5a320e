"""The kernels on a GPU, where there is one: both types, engines, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch
from gptq_layers import random_layer, random_x, relative_error
from weightops_kernels import launch, layout
from weightops_kernels.configs import REDUCTIONS, Config
from weightops_kernels.linear import QuantLinear

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU"),
    pytest.mark.skipif(launch.available() is not None, reason=str(launch.available())),
]
DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (4, -1), (4, 100), (2, 64), (3, 128), (8, 128)])
def test_sums_equal_float64(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """Within 1e-5 and not 1e-6: the tensor cores of Hopper add products at less than float32's precision."""
    for (m, k, n), act_order in itertools.product([(1, 512, 256), (17, 1000, 328), (130, 4096, 1024)], (False, True)):
        layer = random_layer(k, n, group_size, bits, act_order)
        weight = layout.repack(layer.packed.to("cuda"))
        x = random_x(m, k).to(dtype)
        exact = x.double() @ layer.weight()
        for reduction, splits in itertools.product(REDUCTIONS, (1, 4)):
            out = torch.full((m, n), torch.nan, device="cuda")
            config = Config(16 if m <= 16 else 64, 128, splits, reduction=reduction)
            assert relative_error(launch.matmul(x.cuda(), weight, config, out=out).cpu(), exact) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_seed_runs(dtype: torch.dtype) -> None:
    layer = random_layer(1024, 512)
    module = QuantLinear.of(layer.packed.to("cuda")).prepare(dtype=dtype)
    assert module.engine == "triton"
    for m in (1, 16, 32, 64, 200, 512, 600):
        x = random_x(m, 1024).to(dtype)
        limit = 2e-3 if dtype == torch.float16 else 1.5e-2
        assert relative_error(module(x.cuda()).cpu(), x.double() @ layer.weight()) < limit


def test_deterministic_sums_have_the_same_bits_in_every_run() -> None:
    layer, x = random_layer(8192, 512), random_x(4, 8192).cuda()
    weight = layout.repack(layer.packed.to("cuda"))
    config = Config(16, 128, 16, reduction="atomic")
    results = [launch.matmul(x, weight, config, deterministic=True) for _ in range(20)]
    assert all(torch.equal(results[0], result) for result in results)


def test_compiled_by_inductor() -> None:
    layer, x = random_layer(512, 256, act_order=True), random_x(4, 512).cuda()
    module = QuantLinear.of(layer.packed.to("cuda")).prepare(deterministic=True)
    assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))
