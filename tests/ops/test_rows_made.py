"""Rows that are made: sums of rows, means of all, normal numbers, combinations after another's rows; in any blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import evaluate, given_tensor, random_tensor, to_bytes, torch_dtype

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.gather import combined
from weightops.ops.lora.product import memory_of, to_narrower
from weightops.ops.pursuit import NOTHING, Pursuit
from weightops.ops.rows import FiniteMean, NormalRows
from weightops.ops.wide import narrowed, widened
from weightops.spec import DType

FLOATS = (DType.F64, DType.F32, DType.BF16, DType.F16)
ROWS = (5, 1, 7)
terms = st.sampled_from(range(len(ROWS))).flatmap(
    lambda source: st.tuples(st.just(source), st.integers(0, ROWS[source] - 1), st.floats(-2, 2))
)


def normal(dtype: DType, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(torch_dtype(dtype))


@settings(max_examples=40)
@given(
    rows=st.lists(st.lists(terms, max_size=4), min_size=1, max_size=12),
    dtype=st.sampled_from(FLOATS),
    block=st.integers(1, 40),
)
def test_sums_of_rows_are_rounded_once_in_any_blocks(
    rows: list[list[tuple[int, int, float]]], dtype: DType, block: int
) -> None:
    matrices = [normal(dtype, count, 3, count) for count in ROWS]
    flat = [term for row in rows for term in row]
    made = combined(
        [given_tensor(matrix) for matrix in matrices],
        np.array([term[:2] for term in flat], "<i4").reshape(-1, 2),
        np.array([len(row) for row in rows]),
        np.array([term[2] for term in flat]),
    )
    expected = []
    for row in rows:
        total = torch.zeros(3, dtype=torch.float64)
        for source, place, weight in row:
            total += weight * matrices[source][place].double()
        expected.append(matrices[row[0][0]][row[0][1]] if len(row) == 1 else rounded(total, dtype))
    assert evaluate(made, block) == to_bytes(torch.stack(expected))


def rounded(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    if dtype in (DType.F64, DType.F32):
        return values.to(torch_dtype(dtype))
    out = torch.empty(values.shape, dtype=torch_dtype(dtype))
    to_narrower(memory_of(out.view(torch.uint8).numpy()), dtype, memory_of(values.numpy()), DType.F64)
    return out


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_alone_keeps_its_bits_and_inputs_may_be_made_themselves(dtype: DType) -> None:
    matrix = random_tensor(dtype, (6, 5), 1)
    places, ones = np.array([[0, 4], [0, 5], [0, 1], [0, 1]]), np.ones(4, int)
    once = combined([given_tensor(matrix)], places, ones, np.ones(4))
    twice = combined([once], np.array([[0, 3], [0, 0]]), ones[:2], np.full(2, 7.0))
    assert evaluate(twice) == to_bytes(matrix[[1, 4]])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5000, 130)])
def test_the_mean_of_all_rows_is_that_of_float64_rounded_once(dtype: DType, rows: int, columns: int) -> None:
    matrix = normal(dtype, rows, columns)
    found = evaluate(LazyTensor.make(FiniteMean("m"), given_tensor(matrix)), 6)
    expected = rounded(matrix.double().mean(0, keepdim=True), dtype)
    both = torch.frombuffer(bytearray(found), dtype=torch_dtype(dtype)).reshape(1, -1)
    if dtype in (DType.F64, DType.F32):
        assert torch.allclose(both, expected, rtol=1e-6, atol=1e-12)
    assert (both != expected).sum() <= (columns if dtype is DType.F64 else columns // 50)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_mean_with_what_is_no_number_names_the_row(odd: float) -> None:
    matrix = normal(DType.BF16, 3000, 200)
    matrix[2100, 7] = odd
    with pytest.raises(IncompatibleInputs, match="the head: row 2100 holds NaN or infinity"):
        evaluate(LazyTensor.make(FiniteMean("the head"), given_tensor(matrix)))


@settings(max_examples=30)
@given(block=st.integers(1, 200), rows=st.integers(1, 9), columns=st.integers(1, 9), dtype=st.sampled_from(FLOATS))
def test_normal_rows_depend_on_nothing_but_seed_key_row_and_column(
    block: int, rows: int, columns: int, dtype: DType
) -> None:
    made = LazyTensor.make(NormalRows(dtype, (rows, columns), 0.5, 3, "a"))
    more = LazyTensor.make(NormalRows(dtype, (rows + 4, columns), 0.5, 3, "a"))
    found = evaluate(made, block)
    assert found == evaluate(more)[: len(found)]
    assert found != evaluate(LazyTensor.make(NormalRows(dtype, (rows, columns), 0.5, 4, "a")))
    assert found != evaluate(LazyTensor.make(NormalRows(dtype, (rows, columns), 0.5, 3, "b")))


def test_normal_rows_are_normal() -> None:
    made = LazyTensor.make(NormalRows(DType.F32, (200, 333), 0.5, 3, "a")).torch()
    assert abs(made.mean().item()) < 0.01
    assert abs(made.std().item() - 0.5) < 0.01
    assert abs((made.abs() < 0.5).float().mean().item() - 0.6827) < 0.01
    assert abs(torch.corrcoef(made[:, :4].T)[0, 1].item()) < 0.2


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_widen_and_narrow_as_they_do_elsewhere(dtype: DType) -> None:
    bits = random_tensor(dtype, (4096,), 5)
    wide = widened(memory_of(bits.view(torch.uint8).numpy()), dtype)
    assert np.array_equal(wide, bits.to(torch.float64 if dtype is DType.F64 else torch.float32).numpy(), equal_nan=True)
    values = normal(DType.F64, 64, 64).flatten()
    values[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e300, -0.0, 2.0**-140], dtype=torch.float64)
    # Halfway between two numbers of bfloat16, and a little off, which two roundings would get wrong.
    values[6:10] = 1 + 2.0**-8 + torch.tensor([0, 2.0**-40, -(2.0**-40), 2.0**-7], dtype=torch.float64)
    out = torch.empty(4096, dtype=torch_dtype(dtype))
    narrowed(memory_of(out.view(torch.uint8).numpy()), dtype, values.numpy())
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out.nan_to_num(), rounded(values, dtype).nan_to_num())


def pursuit(
    donor: torch.Tensor, own: torch.Tensor, rows: list[int], common: list[tuple[int, int]], k: int
) -> LazyTensor:
    data = (np.array(each, "<i4").tobytes() for each in (rows, common))
    return LazyTensor.make(Pursuit(*data, k), given_tensor(donor), given_tensor(own))


def test_a_row_that_common_rows_make_up_is_found_exactly() -> None:
    donor, own = normal(DType.F32, 40, 16), normal(DType.F32, 30, 5, 1)
    donor[33] = 3 * donor[4] - 2 * donor[7] + 0.5 * donor[11]
    common = [(i, 29 - i) for i in range(20)]
    made = pursuit(donor, own, [3, NOTHING, NOTHING - 1 - 33, 0], common, 8).torch()
    assert torch.equal(made[[0, 3]], own[[3, 0]])
    assert made[1].count_nonzero() == 0
    expected = 3 * own[25] - 2 * own[22] + 0.5 * own[18]
    assert torch.allclose(made[2], expected, atol=1e-4)


def test_points_that_are_the_same_and_rows_of_zeros_do_no_harm() -> None:
    donor, own = normal(DType.BF16, 12, 6), normal(DType.BF16, 12, 4, 1)
    donor[1], donor[2], donor[10] = donor[0], donor[0], 0
    made = pursuit(donor, own, [NOTHING - 1 - 11, NOTHING - 1 - 10], [(i, i) for i in range(6)], 5).torch()
    assert made.isfinite().all()
    assert made[1].count_nonzero() == 0


@pytest.mark.parametrize("block", [700, 2049, 2290])
def test_the_combinations_do_not_depend_on_blocks(block: int) -> None:
    donor, own = normal(DType.BF16, 700, 12), normal(DType.BF16, 300, 4, 1)
    rows = [i if i % 3 else NOTHING - 1 - (i + 100) for i in range(290)]
    made = pursuit(donor, own, rows, [(i, i // 3) for i in range(0, 700, 2)], 3)
    assert evaluate(made, block) == evaluate(made)
