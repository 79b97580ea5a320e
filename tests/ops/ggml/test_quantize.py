"""Quantisation against gguf's own, to the bit, however the blocks fall."""

from __future__ import annotations

import functools
import itertools

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import evaluate

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.arrange import Slice
from weightops.ops.ggml import quantize as ggml
from weightops.ops.ggml.quantize import Quantize
from weightops.ops.rows import Given
from weightops.spec import DType, TensorSpec

TYPES = [DType.Q8_0, DType.Q4_0]
SOURCES = [DType.F32, DType.F16, DType.BF16]


def reference(values: np.ndarray, dtype: DType) -> bytes:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype.name]).tobytes()


def stored(values: np.ndarray, dtype: DType = DType.F32) -> tuple[LazyTensor, np.ndarray]:
    """Float32 values cut down to `dtype`, as a tensor and as they then are."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if dtype is DType.BF16:
        cut = (bits >> 16).astype(np.uint16)
        kept = (cut.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):
            cut = values.astype(dtype.value)
        kept = cut.astype(np.float32)
    return LazyTensor.make(Given(dtype, values.shape, cut.tobytes())), kept


def quantized(tensor: LazyTensor, dtype: DType) -> LazyTensor:
    return LazyTensor.make(Quantize(dtype), tensor)


def random_values(kind: str, seed: int) -> np.ndarray:
    """64 blocks: like weights, any bits, halves and what is just below them, equal magnitudes, near the subnormals."""
    random, count = np.random.default_rng(seed), 64 * 32
    if kind == "bits":
        values = np.frombuffer(random.bytes(4 * count), np.float32)
        return np.where(np.abs(values) < 60000, values, np.float32(0))
    scale = np.repeat(10.0 ** random.uniform(-44, 4, 64), 32)
    halves = (random.integers(-15, 16, (64, 32)) / 2).astype(np.float32)
    halves = np.where(random.random((64, 32)) < 0.5, halves, np.nextafter(halves, np.float32(0)))
    halves[:, 0] = random.choice([127, -8], 64)  # blocks whose scale is 1, in one type or the other
    values = {
        "weights": random.standard_normal(count) * 0.02,
        "halves": halves.reshape(-1),
        "ties": random.choice([1, -1, 0.5, 0, -0.0], count) * scale,
        "tiny": random.standard_normal(count) * scale * 1e-4,
        "zeros": random.choice([0, -0.0, 1e-45, -1e-45], count, p=[0.49, 0.49, 0.01, 0.01]),
    }[kind]
    return values.astype(np.float32)


@given(
    st.sampled_from(["weights", "bits", "halves", "ties", "tiny", "zeros"]),
    st.integers(0, 2**32),
    st.sampled_from(SOURCES),
    st.sampled_from(TYPES),
)
def test_bits_are_those_of_gguf(kind: str, seed: int, source: DType, dtype: DType) -> None:
    tensor, values = stored(random_values(kind, seed).reshape(8, -1), source)
    assert evaluate(quantized(tensor, dtype)) == reference(values, dtype)


@given(
    st.lists(st.floats(-524000, 524000, width=32), min_size=32, max_size=32),
    st.sampled_from(TYPES),
)
def test_bits_of_one_block_are_those_of_gguf(block: list[float], dtype: DType) -> None:
    values = np.array(block, np.float32)
    assert evaluate(quantized(stored(values)[0], dtype)) == reference(values, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("first", [3.0, -3.0, -0.0, 0.0, 2e-39, -2e-39])
def test_of_two_largest_the_first_counts(first: float, dtype: DType) -> None:
    values = np.zeros((2, 32), np.float32)
    values[0, 5], values[0, 20] = first, -first
    values[1, 0], values[1, 31] = -first, first
    assert evaluate(quantized(stored(values)[0], dtype)) == reference(values, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_range_of_blocks_is_that_of_the_whole(
    dtype: DType, source: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml, "_PART", 64)
    monkeypatch.setattr(ggml, "_space", functools.cache(ggml._Space))
    tensor, values = stored(np.random.default_rng(1).standard_normal((3, 32 * 9), np.float32), source)
    monkeypatch.setattr(ggml, "_chunk", lambda: 256)  # several chunks, of several parts
    lazy, whole = quantized(tensor, dtype), reference(values, dtype)
    assert lazy.grain == dtype.block[1]
    with Evaluator() as read:
        for start, stop in itertools.combinations(range(0, lazy.nbytes + 1, lazy.grain), 2):
            out = bytearray(stop - start)
            read(lazy, start, memoryview(out))
            assert out == whole[start:stop]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_grain_of_the_input_is_kept(dtype: DType) -> None:
    tensor, values = stored(np.random.default_rng(2).standard_normal((7, 100), np.float32))
    rows = LazyTensor.make(Slice(1, 3, 99), tensor)
    lazy = quantized(rows, dtype)
    assert (rows.grain, lazy.grain) == (96 * 4, 3 * dtype.block[1])
    assert evaluate(lazy, 50) == reference(np.ascontiguousarray(values[:, 3:99]), dtype)


@pytest.mark.parametrize(("dtype", "largest"), [(DType.Q8_0, 65504 * 127.0), (DType.Q4_0, -65504 * 8.0)])
def test_what_no_scale_can_hold_is_refused(dtype: DType, largest: float) -> None:
    values = np.ones((4, 64), np.float32)
    values[2, 40] = largest
    assert evaluate(quantized(stored(values)[0], dtype)) == reference(values, dtype)
    for wrong in (np.nan, -np.nan, np.inf, -np.inf, largest * 1.001):
        values[2, 40] = wrong
        with pytest.raises(CorruptInput, match="not a number, infinite or far too large"):
            evaluate(quantized(stored(values)[0], dtype), 36)


def test_what_is_not_blocks_of_floats_is_refused() -> None:
    def zeros(dtype: DType, *shape: int) -> LazyTensor:
        return LazyTensor.make(Given(dtype, shape, bytes(TensorSpec(dtype, shape).nbytes)))

    for tensor in (zeros(DType.F32, 32, 33), zeros(DType.F32), zeros(DType.I32, 32), zeros(DType.F64, 32)):
        with pytest.raises(IncompatibleInputs, match="cannot quantise"):
            quantized(tensor, DType.Q8_0)
    with pytest.raises(IncompatibleInputs, match="to float16"):
        quantized(zeros(DType.F32, 32), DType.F16)
    assert quantized(zeros(DType.BF16, 0, 64), DType.Q4_0).nbytes == 0


def test_it_survives_json() -> None:
    lazy = quantized(stored(np.zeros((2, 32), np.float32))[0], DType.Q4_0)
    assert LazyTensor.from_json(lazy.to_json()) == lazy
