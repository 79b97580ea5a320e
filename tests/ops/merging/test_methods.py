"""Each method against a naive definition on whole tensors: bits, or what adding up in another order leaves of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from merging_cases import CASES, DTYPES, Case, drawn
from naive_merging import NAIVE, merge, naively
from support import to_bytes

from weightops.ops.merging import inputs
from weightops.ops.merging.methods import METHODS

SHAPES = ((), (1,), (31,), (1100,), (1, 5), (5, 1), (30, 40), (2, 4, 9))
STEP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 3e-6}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of some thousand elements are of several pieces."""
    monkeypatch.setattr(inputs, "PIECE", 1024)


def arrangements(case: Case, dtype: torch.dtype) -> Iterator[tuple[list[torch.Tensor], int | None, Any]]:
    """Tensors of several shapes, by turns of so many models, and the base at each end and in the middle."""
    turns = itertools.cycle(itertools.product(case.others, case.bases))
    for _ in range(DTYPES.index(dtype)):
        next(turns)
    for number, (shape, (n, has_base)) in enumerate(zip(SHAPES, turns)):  # noqa: B905
        base, *others = drawn(shape, dtype, n, seed=number * 10 + n)
        own = [case.own[i % len(case.own)] for i in range(n)]
        if has_base:
            place = (number + n) % (n + 1)
            yield [*others[:place], base, *others[place:]], place, [*own[:place], {}, *own[place:]]
        else:
            yield others, None, own


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance, in parts of the element or of the usual one."""
    size = expected.double().abs().clamp(min=float(expected.double().square().mean().sqrt()) or 1.0)
    return float(((found.double() - expected.double()).abs() / size).max())


@pytest.mark.parametrize(
    ("case", "dtype"), [(c, d) for c in CASES for d in DTYPES], ids=lambda each: str(each).removeprefix("torch.")
)
def test_a_method_gives_what_its_definition_gives(case: Case, dtype: torch.dtype) -> None:
    for tensors, base, own in arrangements(case, dtype):
        found = merge(case.method, tensors, base, case.shared, own)
        expected = naively(case.method, tensors, base, case.shared, own)
        what = tuple(expected.shape), len(tensors), base
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
        if case.is_exact:
            assert to_bytes(found) == to_bytes(expected), what
        else:
            assert far(found, expected) <= STEP[dtype], what


def test_every_method_has_a_definition_and_a_case() -> None:
    assert list(NAIVE.keys() ^ METHODS) == []
    assert {case.method for case in CASES} == set(METHODS)
