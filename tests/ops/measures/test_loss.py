"""Casts that count: bits and counts against a slow reference, for all pairs of types and every number at an edge."""

from __future__ import annotations

import itertools
import math
import struct

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import from_bytes, given_tensor, to_bytes, torch_dtype

from weightops.errors import IncompatibleInputs, UsageError
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.measures import loss as module
from weightops.ops.measures.loss import CountedCast, Loss, Overflow, counted_cast, losses_of
from weightops.ops.measures.loss_table import SHORT, SPACE_NBYTES
from weightops.ops.numbers.float_formats import largest_number
from weightops.spec import DType

TIES = {
    DType.F8_E4M3: 464.0,
    DType.F8_E5M2: 61440.0,
    DType.F8_E4M3FNUZ: 248.0,
    DType.F8_E5M2FNUZ: 61440.0,
    DType.F16: 65520.0,
    DType.BF16: 2.0**128 * (1 - 2.0**-9),
    DType.F32: 2.0**128 * (1 - 2.0**-25),
    DType.F64: math.inf,
}
"""Half way from the largest number to what would be the next."""
SMALLEST = {
    DType.F8_E4M3: (2.0**-9, 2.0**-6),
    DType.F8_E5M2: (2.0**-16, 2.0**-14),
    DType.F8_E4M3FNUZ: (2.0**-10, 2.0**-7),
    DType.F8_E5M2FNUZ: (2.0**-17, 2.0**-15),
    DType.F16: (2.0**-24, 2.0**-14),
    DType.BF16: (2.0**-133, 2.0**-126),
    DType.F32: (2.0**-149, 2.0**-126),
    DType.F64: (5e-324, 2.0**-1022),
}
"""The smallest subnormal and the smallest normal number."""
FLOATS = list(TIES)
PAIRS = [pair for pair in itertools.product(FLOATS, FLOATS) if pair[0] is not pair[1]]
MODES: list[Overflow | None] = [None, "saturate", "inf"]


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> object:
    """Many pieces in little data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 1024)
        patch.setattr(module, "_SPACE_NBYTES", 26 * 1024)
        yield


def edges(new: DType) -> list[float]:
    """Numbers around which the outcome of a cast to `new` changes."""
    least, normal = SMALLEST[new]
    largest, tie = largest_number(new), TIES[new]
    found = [0.0, math.inf, math.nan, largest, tie, 65519.99, 65520.0, 1e5, 1e30, 1e300, 1.0, 1 + 2.0**-30]
    found += [least * f for f in (0.25, 0.5, 0.75, 1.0, 1.5, 2.5)] + [normal * f for f in (0.5, 0.75, 1.0, 1.25)]
    found += [normal - least / 2, normal - least]
    near = [math.nextafter(x, to) for x in found if math.isfinite(x) for to in (math.inf, -math.inf)]
    near += [float(np.nextafter(np.float32(x), np.float32(to))) for x in found if abs(x) < 1e38 for to in (9e37, -1)]
    return [sign * x for x in (*found, *near) for sign in (1, -1)]


def numbers(old: DType, new: DType, kind: str, seed: int, count: int) -> torch.Tensor:
    """Values of `old` with every edge among them."""
    random = np.random.default_rng(seed)
    if kind == "bits":
        values = from_bytes(random.bytes(count * old.itemsize), torch_dtype(old), (count,))
    elif kind == "weights":
        values = torch.from_numpy(random.normal(0, 0.02, count)).to(torch_dtype(old))
    else:  # all between two powers of two: from one normal number to the next, or within the subnormal ones
        low = 1.0 if kind == "normal" else SMALLEST[new][1] / 4
        values = torch.from_numpy(low * (1 + random.random(count))).to(torch_dtype(old))
    if kind == "bits":
        extremes = torch.tensor(edges(new), dtype=torch.float64).to(torch_dtype(old))
        values[random.permutation(count)[: len(extremes)]] = extremes
        if old is DType.F32:
            payloads = [0x7F800001, 0x7FC12345, 0xFFC00000, 0xFF8ABCDE]
            values[:4] = from_bytes(struct.pack("<4I", *payloads), torch.float32, (4,))
    return values


def wide(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float64).numpy()


def reference(values: torch.Tensor, new: DType, mode: Overflow | None) -> tuple[bytes, Loss]:
    """Bits and loss by one definition after the other."""
    x, old = wide(values), DType(str(values.dtype).removeprefix("torch."))
    result = values.to(torch_dtype(new))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = x if new in (DType.F32, DType.F64) else x.astype(np.float32).astype(np.float64)
    tie, fnuz = TIES[new], new.name.endswith("FNUZ")
    beyond = np.isfinite(x) & (np.abs(rounded) > tie if new is DType.F8_E4M3 else np.abs(rounded) >= tie)
    lost = beyond | np.isinf(x) if new is DType.F8_E4M3 else beyond
    signs = torch.from_numpy(np.sign(x))
    if mode == "saturate":
        result[lost] = (signs * largest_number(new)).to(torch_dtype(new))[lost]
    elif mode == "inf" and new is DType.F8_E4M3:
        bits = torch.where(signs < 0, 0xFF, 0x7F).to(torch.uint8).view(torch.float8_e4m3fn)
        result[lost] = bits[lost]
    y = wide(result)
    nan = np.isnan(x)
    assert (np.isnan(y) == nan).all() or fnuz or new is DType.F8_E4M3
    held = lost & (np.abs(y) == largest_number(new))
    size, normal = np.abs(y), SMALLEST[new][1]
    rest = ~nan & ~lost & np.isfinite(x) & (x != 0)
    with np.errstate(all="ignore"):
        errors = (np.abs(y - x) / np.abs(x))[rest]
    if DType.F64 not in (old, new):
        errors = errors.astype(np.float32)
    return to_bytes(result), Loss(
        elements=x.size,
        changed=int((~nan & (x != y)).sum()),
        overflowed=int((beyond & ~held).sum()),
        saturated=int(held.sum()),
        flushed=int(((y == 0) & (x != 0)).sum()),
        subnormal=int(((size > 0) & (size < normal)).sum()),
        nan=int(nan.sum()),
        infinite=int(np.isinf(x).sum()),
        max_relative_error=float(errors.max(initial=0)),
    )


def counted(tensor: LazyTensor, block: int) -> tuple[bytes, Loss]:
    out = bytearray(tensor.nbytes)
    with Evaluator() as read:
        for start in range(0, tensor.nbytes, block):
            read(tensor, start, memoryview(out)[start : start + block])
        return bytes(out), losses_of([tensor], read)["x"]


@pytest.mark.parametrize(("old", "new"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(("bits", "weights", "normal", "subnormal")),
    st.sampled_from(MODES),
    st.integers(0, 2**32),
    st.integers(1, 6),
)
def test_bits_and_counts_are_those_of_the_reference(
    old: DType, new: DType, kind: str, mode: Overflow | None, seed: int, blocks: int
) -> None:
    values = numbers(old, new, kind, seed, 5000 + seed % 7)
    tensor = LazyTensor.make(CountedCast(new, "x", mode), given_tensor(values, old))
    block = 1024 * new.itemsize * blocks
    assert counted(tensor, block) == reference(values, new, mode)


@pytest.mark.parametrize(("old", "new"), [pair for pair in PAIRS if pair[0] in SHORT])
def test_words_that_are_left_out_of_the_count_are_plain(old: DType, new: DType) -> None:
    """All in range, but for a few of every kind: after the first block most are not counted word by word."""
    random = np.random.default_rng(5)
    values = torch.from_numpy(random.uniform(0.5, 1.99, 1 << 15)).to(torch_dtype(old))
    odd = torch.tensor(edges(new), dtype=torch.float64).to(torch_dtype(old))
    values[random.permutation(values.numel())[: odd.numel()]] = odd
    table = module._table(old, new, "inf")
    known = float(table.errors[table.plain.start : table.plain.stop].max())
    counts, words = np.zeros(1 << 16, np.int64), np.frombuffer(to_bytes(values), np.uint16)
    left_out, changed = table.count(words, counts, memoryview(bytearray(SPACE_NBYTES)), known)
    assert left_out > values.numel() / 4
    found = Loss(elements=left_out, changed=changed) + Loss(**table.counted(counts))
    expected = reference(values, new, "inf")[1]
    assert max(known, found.max_relative_error) >= expected.max_relative_error
    assert msgspec.structs.replace(found, max_relative_error=expected.max_relative_error) == expected


NARROWER = [
    (old, new) for old, new in PAIRS if old in (DType.F32, DType.F64) and old.bits > new.bits and "FNUZ" not in new.name
]


@pytest.mark.parametrize(("old", "new"), NARROWER)
def test_refuse_accepts_everything_up_to_the_tie_and_nothing_from_there(old: DType, new: DType) -> None:
    step = np.float32 if old is DType.F32 or new is not DType.F32 else np.float64
    first = step(TIES[new])
    if new is DType.F8_E4M3:
        first = np.nextafter(first, step(np.inf))
    last = np.nextafter(first, step(0))
    fine = torch.tensor([float(last), -float(last), 1.0], dtype=torch_dtype(old))
    if new is not DType.F8_E4M3:
        fine = torch.cat([fine, torch.tensor([math.inf, -math.inf, math.nan], dtype=torch_dtype(old))])
    expected = to_bytes(fine.to(torch_dtype(new)))
    assert counted(LazyTensor.make(CountedCast(new, "x", "refuse"), given_tensor(fine)), 1 << 20)[0] == expected
    for value in (float(first), -float(first), *([math.inf, -math.inf] if new is DType.F8_E4M3 else [])):
        tensor = given_tensor(torch.tensor([1.0, value, math.nan], dtype=torch_dtype(old)))
        with pytest.raises(IncompatibleInputs, match=f"x: at least one value is too large for {new.value}"):
            counted(LazyTensor.make(CountedCast(new, "x", "refuse"), tensor), 1 << 20)


@pytest.mark.parametrize(("old", "new"), [(DType.F32, DType.BF16), (DType.F64, DType.F16), (DType.F32, DType.F8_E5M2)])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_largest_error_is_found_whatever_came_before(old: DType, new: DType, data: st.DataObject) -> None:
    """One number that is not exact in each piece: close to the ties above 1, or below the normal range."""
    half = {DType.BF16: 2.0**-8, DType.F16: 2.0**-11, DType.F8_E5M2: 2.0**-3}[new]
    least, normal = SMALLEST[new]
    ties = [[(1 + half * (2 * k + 1)) * (1 + near) for near in (0, 2.0**-30, -half / 4096)] for k in range(6)]
    small = [normal - least / 2, normal - least * 0.7, normal / 2 + least / 3, normal / 4 + least / 2.2]
    pools = [ties[0], [x for tie in ties[2:] for x in tie], [*small, *(x for tie in ties for x in tie)]]
    pool = data.draw(st.sampled_from([*pools, *([ties[0][2], x] for x in small)]))
    values = torch.full((8 * 1024,), 1.75, dtype=torch_dtype(old))
    chosen = data.draw(st.lists(st.sampled_from(pool), min_size=8, max_size=8))
    values[7::1024] = torch.tensor(chosen, dtype=torch_dtype(old))
    expected = reference(values, new, None)
    assert counted(LazyTensor.make(CountedCast(new, "x"), given_tensor(values)), 1 << 20) == expected


def test_a_refusal_says_which_how_many_and_how_far() -> None:
    tensor = given_tensor(torch.tensor([1.0, 70000.0, -1e6, 2.0]))
    with pytest.raises(IncompatibleInputs, match="2 values are too large for float16") as caught:
        counted(LazyTensor.make(CountedCast(DType.F16, "layers.0\x1b.weight", "refuse"), tensor), 100)
    assert str(caught.value) == (
        r"layers.0\x1b.weight: at least 2 values are too large for float16: "
        "the largest so far is 1000000, that of float16 is 65504"
    )
    assert caught.value.hint is not None
    assert "--on-overflow saturate" in caught.value.hint


def test_a_block_that_is_read_twice_or_out_of_order_is_counted_once() -> None:
    values = numbers(DType.F32, DType.F16, "bits", 1, 4096)
    tensor = LazyTensor.make(CountedCast(DType.F16, "x", "saturate"), given_tensor(values))
    expected, loss = reference(values, DType.F16, "saturate")
    out, half = bytearray(8192), 4096
    with Evaluator() as read:
        for start in (half, 0, 0, half, 0):
            read(tensor, start, memoryview(out)[start : start + half])
        assert (bytes(out), losses_of([tensor], read)) == (expected, {"x": loss})


def test_two_casts_of_one_tensor_are_told_apart() -> None:
    values = numbers(DType.F32, DType.F16, "weights", 1, 4096)
    source = given_tensor(values)
    half, brain = (counted_cast(source, dtype, "x") for dtype in (DType.F16, DType.BF16))
    with Evaluator() as read:
        for start in (0, 4096):
            for tensor in (half, brain):
                read(tensor, start, memoryview(bytearray(4096)))
        for tensor in (half, brain):
            assert losses_of([tensor, tensor], read) == {"x": reference(values, tensor.spec.dtype, None)[1]}
        assert losses_of([source], read) == {}


def test_of_casts_in_a_row_the_last_is_told() -> None:
    values = numbers(DType.F32, DType.BF16, "weights", 1, 4096)
    first = counted_cast(given_tensor(values), DType.BF16, "x")
    second = counted_cast(first, DType.F16, "x")
    with Evaluator() as read:
        read(second, 0, memoryview(bytearray(8192)))
        assert losses_of([second], read) == {"x": reference(values.bfloat16(), DType.F16, None)[1]}


def test_what_is_in_the_type_already_is_not_cast() -> None:
    tensor = given_tensor(torch.ones(3))
    assert counted_cast(tensor, DType.F32, "x", "refuse") is tensor


def test_types_without_a_sign_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="x: cannot count what a cast to float8_e8m0fnu loses"):
        counted_cast(given_tensor(torch.ones(3)), DType.F8_E8M0, "x")


def test_trees_survive_json() -> None:
    tensor = counted_cast(given_tensor(torch.ones(3)), DType.F16, "x", "saturate")
    assert LazyTensor.from_json(tensor.to_json()) == tensor
