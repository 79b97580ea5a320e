"""What the compiler makes of the kernels for GPUs that are not here: no spills, shared memory, instructions."""

from __future__ import annotations

from pathlib import Path

import pytest
from weightops_kernels import aot, launch
from weightops_kernels.configs import SEEDS

pytestmark = pytest.mark.skipif(launch.available() is not None, reason=str(launch.available()))


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where nothing is said


def assert_runs(found: aot.Compiled, capability: int) -> None:
    assert found.stack_nbytes == 0, "registers spill"
    assert found.shared_nbytes <= aot.SHARED_NBYTES[capability]
    assert found.tensor_instructions > 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_few_rows_take_at_most_four_and_a_half_instructions_for_a_weight(capability: int, bf16: bool) -> None:
    found = aot.compile_w4a16(capability, bf16=bf16)
    assert_runs(found, capability)
    assert found.per_weight <= 4.5


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("seed", SEEDS[1:])
def test_more_rows_fit_the_device(seed: tuple[int, ...], capability: int) -> None:
    _, block_m, block_n, warps, stages, _ = seed
    assert_runs(aot.compile_w4a16(capability, block_m, block_n, warps, stages), capability)


def test_small_groups_and_ragged_rows_fit_too() -> None:
    assert_runs(aot.compile_w4a16(86, group_size=32, even_k=False), 86)


@pytest.mark.parametrize("bits", [3, 8])
def test_the_plain_kernel_fits(bits: int) -> None:
    assert_runs(aot.compile_wxa16(86, bits), 86)
