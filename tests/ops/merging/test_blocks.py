"""However a tensor is read, in whatever order and by as many threads as there are, its bytes are the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_cases import CASES, Case, drawn
from naive_merging import NAME, lazily, merge
from support import evaluate, to_bytes

from weightops.lazy import Evaluator
from weightops.ops.merging import inputs
from weightops.ops.merging.spherical import sums_of_rows

COLUMNS = 37
"""No power of two divides it, so that blocks of rows begin anywhere."""


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "PIECE", 1024)


def given_to(case: Case, dtype: torch.dtype, shape: tuple[int, ...] = (80, COLUMNS)) -> tuple[list[torch.Tensor], Any]:
    n = case.others[-1] + (len(case.others) > 1)  # six others: of more than four torch adds the last ones otherwise
    return drawn(shape, dtype, n), [{}, *(case.own[i % len(case.own)] for i in range(n))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_range_in_any_order_by_any_number_of_threads(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors, own = given_to(case, dtype)
        if case.bases[0]:
            lazy = lazily(case.method, tensors, 0, case.shared, own)
        else:
            lazy = lazily(case.method, tensors[1:], None, case.shared, own[1:])
        whole, chance = evaluate(lazy), random.Random(7)
        for threads in (1, 3):
            with Evaluator(threads=threads) as read:
                for _ in range(3):
                    start = chance.randrange(lazy.nbytes)
                    out = bytearray(chance.randint(1, min(6000, lazy.nbytes - start)))
                    read(lazy, start, memoryview(out))
                    assert out == whole[start : start + len(out)], (dtype, threads, start, len(out))


@settings(max_examples=6)
@given(
    st.integers(500, 6000), st.sampled_from(["ties", "breadcrumbs_ties", "della", "sce", "dare_ties", "model_stock"])
)
def test_blocks_of_any_size(block: int, method: str) -> None:
    own = [{}, *({"weight": 1.0, "density": 0.4, "gamma": 0.1, "epsilon": 0.2} for _ in range(2))]
    shared = {"select_topk": 0.3} if method == "sce" else {}
    tensors = drawn((70, COLUMNS), torch.bfloat16, 2)  # many changes tie
    lazy = lazily(method, tensors, 0, shared, own)
    assert evaluate(lazy, block) == evaluate(lazy)


@pytest.mark.parametrize("columns", [1, 5, 37, 64, 1000, 5000])
def test_the_sum_of_a_row_does_not_depend_on_how_many_rows_there_are(columns: int) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        (x,) = drawn((9, columns), dtype, 0)
        whole = sums_of_rows(x, torch.float32 if dtype == torch.bfloat16 else dtype)
        for n in range(1, 9):
            assert torch.equal(sums_of_rows(x[:n], whole.dtype), whole[:n]), (dtype, n)


def test_two_tensors_read_in_turn_do_not_disturb_each_other() -> None:
    tensors, own = drawn((3000,), torch.bfloat16, 2), [{}, *([{"weight": 1.0, "density": 0.3}] * 2)]
    both = [lazily("ties", tensors, 0, None, own), lazily("ties", tensors[::-1], 2, None, own[::-1])]
    found = [bytearray(lazy.nbytes) for lazy in both]
    with Evaluator() as read:
        for start in range(0, len(found[0]), 2048):
            for lazy, out in zip(both, found, strict=True):
                read(lazy, start, memoryview(out)[start : start + 2048])
    assert found == [evaluate(lazy) for lazy in both]


def test_pieces_of_another_size_change_nothing_where_no_sum_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in CASES:
        if not case.is_exact or not case.bases[0]:
            continue
        tensors, own = given_to(case, torch.bfloat16)
        found = []
        for piece in (1024, 1 << 18):
            monkeypatch.setattr(inputs, "PIECE", piece)
            found.append(to_bytes(merge(case.method, tensors, 0, case.shared, own)))
        assert found[0] == found[1], case


def test_an_empty_tensor_is_merged_to_an_empty_one() -> None:
    for case in CASES:
        if case.bases[0]:
            tensors, own = given_to(case, torch.float32, (0, 4))
            found = merge(case.method, tensors, 0, case.shared, own, name=NAME)
            assert found.shape == (0, 4), case
