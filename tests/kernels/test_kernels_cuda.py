"""The kernels on a GPU, where there is one: both types, engines, determinism; see `gpu_checks`."""

from __future__ import annotations

import gpu_checks
import pytest
import torch
from gpu_checks import DTYPES, FORMATS
from weightops_kernels import launch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU"),
    pytest.mark.skipif(launch.available() is not None, reason=str(launch.available())),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_sums_equal_float64(bits: int, group_size: int, dtype: torch.dtype) -> None:
    gpu_checks.sums_equal_float64(bits, group_size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_seed_runs(dtype: torch.dtype) -> None:
    gpu_checks.every_seed_runs(dtype, "cuda")


def test_deterministic_sums_have_the_same_bits_in_every_run() -> None:
    gpu_checks.deterministic_sums_repeat("cuda")


def test_compiled_by_inductor() -> None:
    gpu_checks.compiled_by_inductor("cuda")
