"""Factors of low rank against numpy's singular value decomposition of the whole."""

from __future__ import annotations

import tracemalloc
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import evaluate, given_tensor, random_tensor

from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.lora.lowrank import OVERSAMPLE, PASSES, Change, LowRank, SingularValues
from weightops.ops.rows import Repeat
from weightops.spec import DType

Matrix = np.ndarray[Any, Any]


def pair(change: Matrix, base: Matrix | None = None) -> tuple[LazyTensor, LazyTensor]:
    """Lazy tensors, the second of which is the first plus `change`, in its type; by default of zeros."""
    base = np.zeros_like(change) if base is None else base
    return given_tensor(torch.from_numpy(base)), given_tensor(torch.from_numpy(base + change))


def low_rank(
    inputs: tuple[LazyTensor, LazyTensor], rank: int, part: Literal["left", "right"], seed: int = 0, **more: Any
) -> LazyTensor:
    rows, columns = inputs[0].spec.shape
    width = min(rows, columns, rank + OVERSAMPLE)
    return LazyTensor.make(LowRank((rows, columns), width, PASSES, seed, "x", rank, part, **more), *inputs)


def as_matrix(tensor: LazyTensor, block: int | None = None) -> Matrix:
    data = np.frombuffer(evaluate(tensor, block), dtype=tensor.spec.dtype.value)
    return data.reshape(tensor.spec.shape).astype(np.float64)


def product(inputs: tuple[LazyTensor, LazyTensor], rank: int) -> Matrix:
    return as_matrix(low_rank(inputs, rank, "left")) @ as_matrix(low_rank(inputs, rank, "right"))


def with_spectrum(values: Matrix, rows: int, columns: int, seed: int = 0) -> Matrix:
    """A matrix with these singular values, in float32."""
    random = np.random.default_rng(seed)
    left, right = (np.linalg.qr(random.standard_normal((n, len(values))))[0] for n in (rows, columns))
    return ((left * values) @ right.T).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_change_of_that_rank_is_given_back(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    rank = data.draw(st.integers(1, min(rows, columns)))
    condition = data.draw(st.sampled_from([1.0, 1e2, 1e4]))
    size = data.draw(st.sampled_from([1e-6, 1.0, 1e6]))
    change = with_spectrum(size * np.geomspace(1, 1 / condition, rank), rows, columns, seed=rank)
    found = product(pair(change), rank)
    assert np.linalg.norm(found - change) <= 1e-5 * np.linalg.norm(change)


SPECTRA = {
    "flat": np.ones(160),
    "slow": np.arange(1, 161) ** -0.25,
    "power law": np.arange(1, 161) ** -1.0,
    "steep": np.arange(1, 161) ** -2.0,
}


@pytest.mark.parametrize("shape", [(160, 260), (260, 160)])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "gaussian"])
def test_the_residual_is_within_two_percent_of_the_best(shape: tuple[int, int], spectrum: str) -> None:
    gaussian = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    change = gaussian if spectrum == "gaussian" else with_spectrum(SPECTRA[spectrum], *shape)
    exact = SPECTRA.get(spectrum, np.linalg.svd(gaussian, compute_uv=False))
    residual = np.linalg.norm(change - product(pair(change), 16))
    assert residual <= 1.02 * np.linalg.norm(exact[16:])


def test_half_precision_weights_change_by_the_difference_of_what_they_hold() -> None:
    base, tuned = random_normal((80, 50), 0).bfloat16(), random_normal((80, 50), 1).bfloat16()
    inputs = (cast(given_tensor(base), DType.F32), cast(given_tensor(tuned), DType.F32))
    change = (tuned.double() - base.double()).numpy()
    assert np.linalg.norm(product(inputs, 50) - change) <= 1e-6 * np.linalg.norm(change)


def test_float64_weights_keep_changes_that_float32_cannot_see() -> None:
    base = np.ones((40, 30))
    change = with_spectrum(1e-10 * np.ones(4), 40, 30).astype(np.float64)
    inputs = pair(change, base)
    assert np.linalg.norm(product(inputs, 4) - change) <= 1e-5 * np.linalg.norm(change)


def test_the_factors_share_the_singular_values_and_can_be_transposed() -> None:
    inputs = pair(with_spectrum(np.array([9.0, 4.0]), 30, 20))
    left, right = as_matrix(low_rank(inputs, 2, "left")), as_matrix(low_rank(inputs, 2, "right"))
    np.testing.assert_allclose(left.T @ left, np.diag([9, 4]), atol=1e-5)
    np.testing.assert_allclose(right @ right.T, np.diag([9, 4]), atol=1e-5)
    np.testing.assert_array_equal(as_matrix(low_rank(inputs, 2, "left", transpose=True)), left.T)
    np.testing.assert_array_equal(as_matrix(low_rank(inputs, 2, "right", transpose=True)), right.T)


@settings(max_examples=10, deadline=None)
@given(block=st.integers(1, 999), part=st.sampled_from(["left", "right"]), transpose=st.booleans())
def test_blocks_do_not_matter(block: int, part: Literal["left", "right"], transpose: bool) -> None:
    tensor = low_rank(pair(with_spectrum(SPECTRA["slow"][:20], 40, 20)), 3, part, transpose=transpose)
    assert evaluate(tensor, block) == evaluate(tensor)


def test_matrices_of_many_blocks_are_all_there() -> None:
    """3000 rows of 1024 columns are made in three blocks, the last of them smaller."""
    change = with_spectrum(np.ones(3), 3000, 1024)
    assert np.linalg.norm(product(pair(change), 3) - change) <= 1e-5 * np.linalg.norm(change)


def test_the_seed_draws_the_matrix() -> None:
    inputs = pair(with_spectrum(SPECTRA["slow"], 160, 160))
    same, again, other = (evaluate(low_rank(inputs, 4, "left", seed=seed)) for seed in (7, 7, 8))
    assert same == again != other


def test_both_factors_come_of_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decompose = LowRank.decompose
    monkeypatch.setattr(LowRank, "decompose", lambda *args: calls.append(1) or decompose(*args))
    one, two = pair(with_spectrum(np.ones(2), 9, 8)), pair(with_spectrum(np.ones(2), 9, 8, seed=1))
    with Evaluator() as read:
        for inputs in (one, two):
            read.whole(low_rank(inputs, 2, "left"))
            read.whole(low_rank(inputs, 2, "right", transpose=True))
    assert len(calls) == 2


def test_what_the_factors_hold_is_noted() -> None:
    base = np.full((60, 40), 0.5, dtype=np.float32)
    inputs = pair(with_spectrum(SPECTRA["slow"][:40], 60, 40), base)
    change = as_matrix(inputs[1]) - base
    with Evaluator() as read:
        factor = low_rank(inputs, 5, "right")
        read.whole(factor)
        found = read.noted([factor])["x"]
    residual = np.linalg.norm(change - product(inputs, 5))
    assert found["energy"] == pytest.approx(1 - (residual / np.linalg.norm(change)) ** 2, abs=1e-6)
    assert found["rank"] == 5
    assert found["change"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(base), rel=1e-6)


def test_no_change_has_factors_of_zeros() -> None:
    inputs = pair(np.zeros((6, 5), dtype=np.float32), np.ones((6, 5), dtype=np.float32))
    assert not product(inputs, 2).any()


def test_singular_values_are_those_of_numpy() -> None:
    change = with_spectrum(np.geomspace(1, 1e-3, 30), 50, 30)
    found = as_matrix(LazyTensor.make(SingularValues((50, 30), 30, PASSES, 0, "x"), *pair(change)))
    np.testing.assert_allclose(found, np.linalg.svd(change.astype(np.float64), compute_uv=False), rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_change_that_is_not_finite_is_refused_by_name(value: float) -> None:
    change = np.ones((8, 8), dtype=np.float32)
    change[3, 4] = value
    with pytest.raises(CorruptInput, match=r"x: the change is not finite"):
        evaluate(low_rank(pair(change), 2, "left"))


def test_memory_is_that_of_a_few_blocks_and_thin_factors() -> None:
    """Two matrices of 64 MiB, and what the op says that it needs beyond its inputs: 21 MiB."""
    inputs = tuple(LazyTensor.make(Repeat(DType.F32, (4096, 4096), n.tobytes())) for n in np.float32([1, 2]))
    tensor = low_rank((inputs[0], inputs[1]), 8, "left")
    with Evaluator() as read:
        tracemalloc.start()
        try:
            read.whole(tensor)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak <= tensor.op.scratch_nbytes + tensor.nbytes < 24 << 20


def test_an_op_survives_json() -> None:
    tensor = low_rank(pair(np.ones((3, 4), dtype=np.float32)), 2, "right", transpose=True)
    assert LazyTensor.from_json(tensor.to_json()) == tensor


@pytest.mark.parametrize(
    ("shape", "width", "rank", "error"),
    [((4, 3), 3, 2, IncompatibleInputs), ((3, 4), 4, 2, UsageError), ((3, 4), 2, 3, UsageError)],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, int], width: int, rank: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        LazyTensor.make(LowRank(shape, width, PASSES, 0, "x", rank, "left"), *pair(np.ones((3, 4), dtype=np.float32)))


# --- how two tensors differ ---------------------------------------------------------------------------------------


def random_normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def change_of(base: torch.Tensor, tuned: torch.Tensor) -> list[float]:
    tensor = LazyTensor.make(Change(), given_tensor(base), given_tensor(tuned))
    return np.frombuffer(evaluate(tensor), dtype=np.float64).tolist()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([DType.F32, DType.F64, DType.U8, DType.I64]), count=st.integers(0, 200), seed=st.integers()
)
def test_elements_that_differ_are_counted_whatever_their_bits(dtype: DType, count: int, seed: int) -> None:
    base, tuned = random_tensor(dtype, (count,), seed % 999), random_tensor(dtype, (count,), seed % 998 + 1)
    same = torch.arange(count) % 3 == 0
    tuned[same] = base[same]
    expected = (base != tuned) & ~((base != base) & (tuned != tuned))
    assert change_of(base, tuned)[0] == int(expected.sum())


def test_norms_are_those_of_float64_over_more_than_a_block() -> None:
    base, tuned = random_normal((1200, 1000), 0), random_normal((1200, 1000), 1)
    count, change, size = change_of(base, tuned)
    assert count == int((base != tuned).sum())
    assert change == pytest.approx(float((tuned - base).double().square().sum()), rel=1e-9)
    assert size == pytest.approx(float(base.double().square().sum()), rel=1e-9)


def test_zeros_of_either_sign_and_two_nans_do_not_differ() -> None:
    base, tuned = torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([-0.0, torch.nan, 1.0])
    assert change_of(base, tuned)[:2] == [0, 0]
