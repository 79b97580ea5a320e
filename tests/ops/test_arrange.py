"""Joining, cutting and reordering: as torch does it, whole and in any part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import evaluate, given_tensor, to_bytes

from weightops.errors import CorruptInput, IncompatibleInputs, WeightopsError
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.arrange import (
    Agreed,
    Concat,
    Slice,
    SwapRows,
    concat,
    cut,
    halves_to_pairs,
    pairs_to_halves,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64)


def made(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, 120, tuple(shape), generator=numbers).to(dtype)


blocks = st.integers(1, 400)


@given(st.data(), st.sampled_from(DTYPES), blocks)
def test_concat_is_cat(data: st.DataObject, dtype: torch.dtype, block: int) -> None:
    rank = data.draw(st.integers(1, 3))
    axis = data.draw(st.integers(0, rank - 1))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    parts = [made((*shape[:axis], n, *shape[axis + 1 :]), dtype, i) for i, n in enumerate(sizes)]
    joined = LazyTensor.make(Concat(axis), *map(given_tensor, parts))
    expected = torch.cat(parts, dim=axis)
    assert joined.spec.shape == tuple(expected.shape)
    assert evaluate(joined, block) == to_bytes(expected)


@given(st.data(), st.sampled_from(DTYPES), blocks)
def test_cut_is_narrow_whatever_it_is_cut_from(data: st.DataObject, dtype: torch.dtype, block: int) -> None:
    heads, half, width, axis = data.draw(st.tuples(*[st.integers(1, 4)] * 3, st.integers(0, 1)))
    whole = made((heads * half * 2, width * 3), dtype)
    pieces = torch.chunk(whole, data.draw(st.integers(1, 3)), dim=data.draw(st.integers(0, 1)))
    axis_of_pieces = 0 if pieces[0].shape[1] == whole.shape[1] else 1
    tensor = concat([given_tensor(piece.contiguous()) for piece in pieces], axis_of_pieces)
    if data.draw(st.booleans()):
        tensor = pairs_to_halves(tensor, heads)
        whole = whole.view(heads, half, 2, -1).transpose(1, 2).reshape(whole.shape)
    for _ in range(data.draw(st.integers(1, 2))):
        size = whole.shape[axis]
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        tensor, whole = cut(tensor, axis, start, stop), whole.narrow(axis, start, stop - start)
    assert evaluate(tensor, block) == to_bytes(whole)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4), st.sampled_from(DTYPES), blocks)
def test_rotary_orders_are_those_of_the_reference(
    heads: int, half: int, width: int, dtype: torch.dtype, block: int
) -> None:
    shape = (heads * half * 2, width) if width else (heads * half * 2,)
    pairs = made(shape, dtype)
    halves = pairs.view(heads, half, 2, -1).transpose(1, 2).reshape(shape)
    tensor = given_tensor(pairs)
    assert evaluate(pairs_to_halves(tensor, heads), block) == to_bytes(halves)
    assert evaluate(halves_to_pairs(given_tensor(halves), heads), block) == to_bytes(pairs)
    assert halves_to_pairs(pairs_to_halves(tensor, heads), heads) == tensor


def test_what_is_cut_at_whole_heads_reads_nothing_else() -> None:
    parts = [given_tensor(made((8, 4), torch.float16, seed)) for seed in range(2)]
    first = cut(pairs_to_halves(concat(parts, 0), 4), 0, 0, 8)
    assert first == pairs_to_halves(parts[0], 2)


def test_wide_rows_are_cut_in_little_memory() -> None:
    tensor = given_tensor(made((64, 1 << 17), torch.uint8))
    part = LazyTensor.make(Slice(1, 5, 9), tensor)
    with Evaluator() as read:
        read(part, 0, memoryview(bytearray(part.nbytes)))
        assert max(map(len, read._spare)) <= 4 << 20


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: LazyTensor.make(Concat(0), a, b),
        lambda a, b: LazyTensor.make(Slice(0, 2, 9), a),
        lambda a, b: LazyTensor.make(Slice(2, 0, 1), a),
        lambda a, b: LazyTensor.make(SwapRows(3, 2, 2), a),
        lambda a, b: LazyTensor.make(Agreed("copies"), a, b),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[LazyTensor, LazyTensor], LazyTensor]) -> None:
    a, b = given_tensor(made((4, 2), torch.float16)), given_tensor(made((4, 3), torch.float16))
    with pytest.raises(WeightopsError, match=r"float16 \[4, [23]\]") as raised:
        make(a, b)
    assert isinstance(raised.value, IncompatibleInputs | CorruptInput)


def test_copies_that_differ_are_refused() -> None:
    same, other = made((4, 2), torch.float16), made((4, 2), torch.float16, 1)
    agreed = LazyTensor.make(Agreed("k of layer 3"), given_tensor(same), given_tensor(same))
    assert evaluate(agreed) == to_bytes(same)
    with pytest.raises(CorruptInput, match="k of layer 3: the values differ"):
        evaluate(LazyTensor.make(Agreed("k of layer 3"), given_tensor(same), given_tensor(other)))
