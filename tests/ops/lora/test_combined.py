"""Combined factors as ops: any shapes, either way round, and what is noted of them; and what comes back of a weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.lora.arithmetic import combine, largest
from weightops.ops.lora.combined import CombinedFactor, WeightedSum, combined_pair
from weightops.ops.lora.returning import Returning
from weightops.ops.rows import Given
from weightops.spec import DType


def lazy(array: np.ndarray) -> LazyTensor:
    return LazyTensor.make(Given(DType(str(array.dtype)), array.shape, array.tobytes()))


def values(tensor: LazyTensor, read: Evaluator) -> np.ndarray:
    return np.frombuffer(read.whole(tensor), np.float32).reshape(tensor.spec.shape).astype(np.float64)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return b.reshape(len(b), -1) @ a.reshape(len(a), -1)


@given(
    seed=st.integers(0, 1000),
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    rank=st.integers(1, 9),
    kernel=st.sampled_from([(), (3, 2)]),
)
def test_svd_is_the_best_of_its_rank(
    seed: int, out: int, width: int, ranks: list[int], rank: int, kernel: tuple[int, ...]
) -> None:
    random = np.random.default_rng(seed)
    terms = tuple((float(random.normal()), float(random.uniform(0.1, 3))) for _ in ranks)
    pairs = [
        (
            random.standard_normal((r, width, *kernel)).astype(np.float32),
            random.standard_normal((out, r, *(1 for _ in kernel))).astype(np.float32),
        )
        for r in ranks
    ]
    exact = sum(w * s * product(a.astype(np.float64), b) for (w, s), (a, b) in zip(terms, pairs, strict=True))
    wanted = min(rank, sum(ranks), out, width * math.prod(kernel))
    how = CombinedFactor("svd", terms, wanted, "a", "m")
    with Evaluator() as read:
        a, b = (values(each, read) for each in combined_pair(how, [lazy(x) for pair in pairs for x in pair]))
        notes = dict(read.notes.values())["m"]
    singular = np.linalg.svd(exact, compute_uv=False)
    best = np.sqrt((singular[wanted:] ** 2).sum())
    assert a.shape[1:] == (width, *kernel)
    assert b.shape[0] == out
    size = np.linalg.norm(exact)
    assert np.linalg.norm(product(a, b) - exact) == pytest.approx(best, rel=1e-4, abs=3e-6 * size)
    assert notes["norm"] == pytest.approx(size, rel=1e-6)
    assert notes["error"] * size == pytest.approx(best, rel=1e-4, abs=1e-6 * size)


@given(seed=st.integers(0, 1000), out=st.integers(2, 12), width=st.integers(2, 12), rank=st.integers(1, 12))
def test_whole_products_are_decomposed_either_way_round(seed: int, out: int, width: int, rank: int) -> None:
    random = np.random.default_rng(seed)
    pairs = [random.standard_normal(shape).astype(np.float32) for shape in ((3, width), (out, 3), (2, width), (out, 2))]
    rank = min(rank, out, width)
    how = CombinedFactor("magnitude_prune_svd", ((0.5, 2.0), (-1.0, 1.5)), rank, "a", "m", density=0.6)
    with Evaluator() as read:
        a, b = (values(each, read) for each in combined_pair(how, [lazy(x) for x in pairs]))
    made = []
    for (x, y), scale in zip((pairs[:2], pairs[2:]), (2.0, 1.5), strict=True):
        change = torch.from_numpy(np.float32(scale) * (y @ x))
        kept = change.abs().flatten().argsort(descending=True)[: int(0.6 * change.numel())]
        made.append(torch.zeros(change.numel()).index_copy(0, kept, change.flatten()[kept]).reshape(change.shape))
    whole = (0.5 * made[0] - made[1]).double()
    left, singular, right = torch.linalg.svd(whole, full_matrices=False)
    gap = float(singular[rank - 1] - singular[rank]) / float(singular[0]) if rank < len(singular) else 1.0
    if gap > 1e-2:  # else another pair of vectors is as good
        best = left[:, :rank] * singular[:rank] @ right[:rank]
        assert float((torch.from_numpy(b @ a) - best).norm()) <= 1e-4 * float(whole.norm())


def test_of_equal_sizes_those_that_spread_evenly() -> None:
    same = np.ones(12, np.float32)
    assert largest(same, 0.25).nonzero()[0].tolist() == [3, 7, 11]
    assert not largest(same, 0.05).any()
    mixed = np.array([1, -5, 1, 1, 3, 1], np.float32)
    assert largest(mixed, 0.5).sum() == 3
    assert largest(mixed, 0.5)[[1, 4]].all()


def test_a_sum_of_three_is_that_of_their_order() -> None:
    tensors = [np.array([x], np.float32) for x in (1e8, 1.0, -1e8)]
    assert combine("linear", lambda i: tensors[i].copy(), [1.0, 1.0, 1.0]).tolist() == [0.0]
    votes = [
        np.array([3.0, -1, 0], np.float32),
        np.array([-1.0, -1, 0], np.float32),
        np.array([-1.0, 4, 0], np.float32),
    ]
    assert combine("ties", lambda i: votes[i].copy(), [1, 1, 1]).tolist() == [3.0, 4.0, 0.0]
    assert combine("ties", lambda i: votes[i].copy(), [1, 1, 1], vote="frequency").tolist() == [-1.0, -1.0, 0.0]


def test_what_cannot_be_combined() -> None:
    a, b = (np.ones(shape, np.float32) for shape in ((2, 4), (3, 2)))
    with pytest.raises(IncompatibleInputs, match="have no product"):
        combined_pair(CombinedFactor("cat", ((1.0, 1.0),), 2, "a", "m"), [lazy(a), lazy(a)])
    two = [lazy(x) for x in (a, b, np.ones((2, 5), np.float32), b)]
    with pytest.raises(IncompatibleInputs, match="cannot be added to"):
        combined_pair(CombinedFactor("cat", ((1.0, 1.0),) * 2, 4, "a", "m"), two)
    one, _ = combined_pair(CombinedFactor("svd", ((1.0, 1.0),), 2, "a", "m"), [lazy(a), lazy(b * math.nan)])
    with pytest.raises(CorruptInput, match="m: the factors hold NaN or infinities"):
        one.read()
    with pytest.raises(IncompatibleInputs, match="cannot add"):
        LazyTensor.make(WeightedSum((1.0, 1.0)), lazy(a), lazy(b))
    with pytest.raises(IncompatibleInputs, match="cannot hold the roundings"):
        LazyTensor.make(Returning(), lazy(a), lazy(b))


def test_what_comes_back_by_sizes() -> None:
    changed = np.array([1.5, 1.5, 8.0, 0.0, 1.0], np.float16)
    result = np.array([1.25, 3.0, 1.0, 0.0, 0.25], np.float16)
    same, off, size = np.frombuffer(LazyTensor.make(Returning(), lazy(changed), lazy(result)).read(), np.float64)
    # 8 has eight times the spacing of 1, and 1 four times that of a quarter.
    assert same == 1 + 1 + 1 / 8 + 1 + 1 / 4
    assert off == (66 / 12) * 2.0**-20 + (18 / 12) * 2.0**-24
    assert size == float((result.astype(np.float64) ** 2).sum())
