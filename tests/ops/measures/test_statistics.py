"""Statistics against torch on the whole tensor, however the blocks fall."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import TORCH_DTYPES, from_bytes, given_tensor, random_tensor, torch_dtype

from weightops.errors import UsageError
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.arrange import Slice
from weightops.ops.measures.counting import count_words
from weightops.ops.measures.statistics import TensorStatistics, has_statistics, statistics
from weightops.ops.numbers.ranges import SMALLEST_NORMAL, values_of
from weightops.ops.rows import Given
from weightops.spec import DType

WIDE = [DType.F32, DType.F64]
ALL = [d for d in TORCH_DTYPES if has_statistics(d)]
SHORT = [d for d in ALL if d.itemsize <= 2]


def measure(tensor: LazyTensor, block_nbytes: int = 1 << 22, *, rows: bool = False) -> TensorStatistics:
    with Evaluator() as read:
        node = statistics(tensor, "x", rows=rows)
        for _ in read.drain(node, block_nbytes):
            pass
        assert not read.running
        return TensorStatistics.from_note(read.noted([node])["x"])


def moments(finite: list[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None where there is nothing, or a square overflows."""
    if not finite:
        return None, None
    try:
        mean = math.fsum(finite) / len(finite)
        return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in finite) / len(finite))
    except OverflowError:
        return None, None


def expected(tensor: torch.Tensor, dtype: DType) -> TensorStatistics:
    """From Python's numbers, one by one."""
    values = (tensor.to(torch.float64) if dtype.is_float else tensor).flatten().tolist()
    finite = [v for v in values if math.isfinite(v)]
    smallest = 2.0 ** SMALLEST_NORMAL[dtype] if dtype in SMALLEST_NORMAL else 0
    normal = [abs(v) for v in finite if v and abs(v) >= smallest]
    # int.bit_length is exact where a conversion to float64 would round up to the next power of two.
    exponents = [v.bit_length() - 1 if isinstance(v, int) else math.frexp(v)[1] - 1 for v in normal]
    zero = sum(v == 0 for v in finite)
    mean, std = moments(finite)
    return TensorStatistics(
        elements=len(values),
        nan=sum(math.isnan(v) for v in values),
        infinite=sum(math.isinf(v) for v in values),
        zero=zero,
        subnormal=len(finite) - zero - len(normal),
        minimum=min(finite, default=None),
        maximum=max(finite, default=None),
        mean=mean,
        std=std,
        histogram={e: exponents.count(e) for e in sorted(set(exponents))},
    )


def assert_same(found: TensorStatistics, wanted: TensorStatistics) -> None:
    for name in (n for n in TensorStatistics.__struct_fields__ if n not in ("mean", "std")):
        assert getattr(found, name) == getattr(wanted, name), name
    if wanted.mean is not None and wanted.std is not None and found.absmax is not None:
        assert found.mean == pytest.approx(wanted.mean, rel=1e-12, abs=1e-12 * found.absmax)
        assert found.std == pytest.approx(wanted.std, rel=1e-12, abs=1e-12 * found.absmax)


@settings(deadline=None)
@given(st.sampled_from(ALL), st.integers(0, 200), st.integers(0, 2**32), st.integers(1, 300))
@example(DType.F32, 0, 0, 8)
def test_statistics_of_any_bits(dtype: DType, count: int, seed: int, block: int) -> None:
    tensor = random_tensor(dtype, (count,), seed)
    if dtype is DType.F64:
        tensor = tensor.clamp(-1e150, 1e150)  # beyond, the square is no float64
    assert_same(measure(given_tensor(tensor, dtype), block), expected(tensor, dtype))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_moments_of_many_elements(dtype: DType) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(700_001, generator=generator, dtype=torch.float64) * 0.02 + 1e-3).to(torch_dtype(dtype))
    found, exact = measure(given_tensor(tensor, dtype)), tensor.to(torch.float64)
    mean = math.fsum(exact.tolist()) / exact.numel()
    std = math.sqrt(math.fsum(((exact - mean) ** 2).tolist()) / exact.numel())
    assert (found.elements, found.minimum, found.maximum) == (700_001, exact.min().item(), exact.max().item())
    assert found.mean == pytest.approx(mean, rel=1e-11)
    assert found.std == pytest.approx(std, rel=1e-11)
    assert found.zero + found.subnormal + sum(found.histogram.values()) == 700_001


@pytest.mark.parametrize("dtype", WIDE)
def test_a_small_spread_around_a_large_mean_is_not_lost(dtype: DType) -> None:
    steps = torch.arange(200_000, dtype=torch.float64) % 2
    found = measure(given_tensor((steps + 2.0**22).to(torch_dtype(dtype))))
    assert (found.mean, found.std) == (2.0**22 + 0.5, 0.5)


@settings(deadline=None)
@given(st.sampled_from(SHORT), st.integers(0, 2**32), st.integers(100, 3000))
def test_sixteen_bits_give_the_same_wherever_blocks_begin(dtype: DType, seed: int, block: int) -> None:
    tensor = given_tensor(random_tensor(dtype, (50, 31), seed), dtype)
    assert measure(tensor, block) == measure(tensor)


def test_pieces_of_wide_types_are_cut_at_the_same_places_in_any_block() -> None:
    tensor = given_tensor(torch.randn(300_000, generator=torch.Generator().manual_seed(1)))
    assert measure(tensor, 1 << 20) == measure(tensor, 1 << 18) == measure(tensor)


def test_a_range_that_comes_twice_or_late_is_not_counted() -> None:
    node = statistics(given_tensor(torch.arange(10.0)), "x")
    out = memoryview(bytearray(40))
    with Evaluator() as read:
        read(node, 8, out[8:20])
        read(node, 0, out[:20])
        read(node, 0, out[:20])
        read(node, 20, out[20:])
        assert TensorStatistics.from_note(read.noted([node])["x"]).elements == 10


@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, 2**54 - 1, 2**53 + 1, -(2**32), 1])
def test_integers_beyond_float64_are_exact(value: int) -> None:
    found = measure(given_tensor(torch.tensor([value, 0])))
    assert (found.minimum, found.maximum) == (min(value, 0), max(value, 0))
    assert (found.zero, found.histogram) == (1, {abs(value).bit_length() - 1: 1})


def test_squares_beyond_float64_leave_the_spread_open() -> None:
    found = measure(given_tensor(torch.tensor([1e300, -1e300], dtype=torch.float64)))
    assert (found.maximum, found.mean, found.std) == (1e300, None, None)


@pytest.mark.parametrize("dtype", [*SHORT, DType.F8_E8M0])
def test_numbers_are_those_of_torch(dtype: DType) -> None:
    count = 1 << 8 * dtype.itemsize
    words = np.arange(count, dtype=f"u{dtype.itemsize}")
    if dtype is DType.BOOL:
        words = words[:2]
    torch_values = from_bytes(words.tobytes(), torch_dtype(dtype), (words.size,)).to(torch.float64).numpy()
    assert np.array_equal(values_of(dtype)[: words.size], torch_values, equal_nan=True)


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32, DType.F64])
def test_rows_of_zeros(dtype: DType) -> None:
    rows = torch.zeros(9, 5, dtype=torch_dtype(dtype))
    rows[2, 3], rows[4, 0], rows[7] = 1, -1, -0.0
    tensor = given_tensor(rows)
    assert measure(tensor, 1, rows=True).zero_rows == 7
    assert measure(tensor, 2 * rows[0].nbytes, rows=True).zero_rows == 7
    assert measure(tensor).zero_rows is None


def test_rows_are_not_counted_where_one_would_fill_the_memory() -> None:
    assert measure(given_tensor(torch.zeros(2, 1 << 20)), rows=True).zero_rows is None


def test_the_inputs_grain_is_kept() -> None:
    source = given_tensor(torch.arange(60.0).reshape(12, 5))
    columns = LazyTensor.make(Slice(1, 1, 3), source)
    found = measure(columns, 7)
    assert (found.elements, found.minimum, found.maximum) == (24, 1.0, 57.0)


def test_types_without_numbers_of_whole_bytes_are_refused() -> None:
    with pytest.raises(UsageError, match="q8_0 has no statistics"):
        statistics(LazyTensor.make(Given(DType.Q8_0, (32,), bytes(34))), "x")


SCRIPT = """
import sys
import numpy as np
from weightops.ops.measures import counting

for size, bins in ((1, 5), (4096, 256), (1 << 18, 65536)):
    words = np.random.default_rng(0).integers(0, bins, size, dtype=np.int32)
    first, second = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    for _ in range(2):
        counting.count_words(words, first, many=True)
        counting.count_words(words, second, many=False)
    assert np.array_equal(first, second) and first.sum() == 2 * size
assert counting._library() is not None and "torch" not in sys.modules
"""


def test_both_ways_of_counting_agree() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_counting_nothing() -> None:
    total = np.zeros(4, np.int64)
    for many in (True, False):
        count_words(np.zeros(0, np.int32), total, many=many)
    assert not total.any()


@pytest.mark.parametrize("odd", [[math.inf], [-math.inf], [math.nan], [-math.inf, math.inf]])
def test_extremes_are_those_of_finite_numbers_whatever_else_there_is(odd: list[float]) -> None:
    tensor = torch.tensor([1.5, -2.5, *odd])
    found = measure(given_tensor(tensor))
    assert (found.minimum, found.maximum) == (-2.5, 1.5)
    assert found == expected(tensor, DType.F32)


@settings(max_examples=60)
@given(st.sampled_from(ALL), st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 40))
def test_statistics_of_parts_add_up_to_those_of_the_whole(dtype: DType, seed: int, first: int, second: int) -> None:
    whole = random_tensor(dtype, (first + second,), seed)
    added = expected(whole[:first], dtype) + expected(whole[first:], dtype)
    found = expected(whole, dtype)
    for name in ("elements", "nan", "infinite", "zero", "subnormal", "minimum", "maximum", "histogram"):
        assert getattr(added, name) == getattr(found, name), name
    size = max(1e-300, abs(found.absmax or 0))
    if size > 1e150:
        return  # a square of the whole may overflow where none of a part does, or the other way round
    if found.mean is None or found.std is None:
        assert (added.mean, added.std) == (found.mean, found.std)
    else:
        assert added.mean == pytest.approx(found.mean, rel=1e-9, abs=1e-9 * size)
        assert added.std == pytest.approx(found.std, rel=1e-6, abs=1e-9 * size)


def test_parts_whose_squares_overflow_add_up() -> None:
    part = TensorStatistics(elements=2, minimum=-1e200, maximum=1e200, mean=0.0, std=1e200)
    assert (part + part).std == pytest.approx(1e200)


def test_what_is_not_known_of_a_part_is_not_known_of_the_whole() -> None:
    known = TensorStatistics(elements=2, minimum=1.0, maximum=3.0, mean=2.0, std=1.0, zero_rows=1)
    overflowed = TensorStatistics(elements=1, minimum=1e308, maximum=1e308)
    nothing = TensorStatistics(elements=4, nan=4, zero_rows=2)
    assert (known + overflowed).mean is None
    assert (known + nothing).mean == 2.0
    assert (nothing + known).std == 1.0
    assert (known + nothing).zero_rows == 3
    assert (known + overflowed).zero_rows is None
