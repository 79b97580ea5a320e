"""Quantisation against gguf's own and files that ggml made, to the bit, however the blocks fall."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support import evaluate

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.arrange import Slice
from weightops.ops.ggml import quantize as ggml
from weightops.ops.ggml.quantize import NEAREST, QUANTIZERS, Quantize
from weightops.ops.rows import Given
from weightops.spec import DType, TensorSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "ggml"
WITH_MINIMUM = [DType.Q4_1, DType.Q5_1]
TYPES = [DType.Q8_0, DType.Q4_0, DType.Q5_0, *WITH_MINIMUM]
"""Those that gguf quantises, too."""
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


def quantized(tensor: LazyTensor, dtype: DType, importance: np.ndarray | None = None) -> LazyTensor:
    if importance is None:
        return LazyTensor.make(Quantize(dtype), tensor)
    return LazyTensor.make(Quantize(dtype), tensor, stored(importance)[0])


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
    # ggml takes the first of zeros that differ in sign, gguf any.
    _, values = stored(random_values(kind, seed).reshape(8, -1), source)
    tensor, values = stored(values + np.float32(0), source)
    assert evaluate(quantized(tensor, dtype)) == reference(values, dtype)


@given(
    st.lists(st.floats(-524000, 524000, width=32), min_size=32, max_size=32),
    st.sampled_from(TYPES),
)
def test_bits_of_one_block_are_those_of_gguf(block: list[float], dtype: DType) -> None:
    values = np.array(block, np.float32) / np.float32(8 if dtype in WITH_MINIMUM else 1) + np.float32(0)
    assert evaluate(quantized(stored(values)[0], dtype)) == reference(values, dtype)


@pytest.mark.parametrize("dtype", [DType.Q8_0, DType.Q4_0, DType.Q5_0])
@pytest.mark.parametrize("first", [3.0, -3.0, 2e-39, -2e-39])
def test_of_two_largest_the_first_counts(first: float, dtype: DType) -> None:
    values = np.zeros((2, 32), np.float32)
    values[0, 5], values[0, 20] = first, -first
    values[1, 0], values[1, 31] = -first, first
    assert evaluate(quantized(stored(values)[0], dtype)) == reference(values, dtype)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("dtype", QUANTIZERS)
def test_bytes_are_those_of_ggml(dtype: DType, weighs: bool) -> None:
    """Weights like a model's with zero blocks, outliers and the like; then rows that are hard in a way each."""
    source, name = load_file(GOLDEN / "source.safetensors"), dtype.value + ".imatrix" * weighs
    wanted = load_file(GOLDEN / "quantised.safetensors")[name]
    found = evaluate(quantized(stored(source["weight"])[0], dtype, source["imatrix"] if weighs else None))
    assert np.array_equal(np.frombuffer(found, np.uint8), wanted.reshape(-1))
    hard = evaluate(quantized(stored(source["hard"])[0], dtype, source["hard.imatrix"] if weighs else None))
    assert hashlib.sha256(hard).hexdigest() == json.loads((GOLDEN / "hard.json").read_text())[name]


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("dtype", QUANTIZERS)
def test_a_block_alone_is_as_among_others(dtype: DType, weighs: bool) -> None:
    """numpy adds up in another order where there is one sum alone."""
    golden, columns = load_file(GOLDEN / "source.safetensors"), dtype.block[0]
    importance = golden["hard.imatrix"][:columns] if weighs else None
    lazy = quantized(stored(golden["hard"][:, :columns])[0], dtype, importance)
    assert evaluate(lazy, lazy.grain) == evaluate(lazy)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("dtype", QUANTIZERS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_range_of_grains_is_that_of_the_whole(
    dtype: DType, source: DType, weighs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(1)
    tensor, values = stored(random.standard_normal((3, 512), np.float32), source)
    importance = random.random(512, np.float32) if weighs else None
    whole = evaluate(quantized(stored(values)[0], dtype, importance))
    monkeypatch.setattr(ggml, "PART", 64)
    monkeypatch.setattr(ggml, "_chunk", lambda: 256)  # several chunks, of several parts
    lazy = quantized(tensor, dtype, importance)
    by_rows = weighs and dtype in {DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1}
    assert lazy.grain == (dtype.nbytes(512) if by_rows else dtype.block[1])
    with Evaluator() as read:
        count = lazy.nbytes // lazy.grain
        for start, stop in itertools.combinations(sorted({0, 1, 2, min(5, count), count}), 2):
            out = bytearray((stop - start) * lazy.grain)
            read(lazy, start * lazy.grain, memoryview(out))
            assert out == whole[start * lazy.grain :][: len(out)]


@pytest.mark.parametrize("dtype", QUANTIZERS)
def test_each_expert_has_its_own_importance(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    weights, importance = random.standard_normal((3, 5, 256), np.float32), random.random((3, 256), np.float32)
    apart = [evaluate(quantized(stored(weights[i])[0], dtype, importance[i])) for i in range(3)]
    monkeypatch.setattr(ggml, "PART", 1024)
    monkeypatch.setattr(ggml, "_chunk", lambda: 2048)  # chunks and parts that end within experts
    lazy = quantized(stored(weights)[0], dtype, importance)
    assert evaluate(lazy) == b"".join(apart)
    assert evaluate(quantized(stored(weights)[0], dtype, importance.reshape(-1))) == b"".join(apart)
    assert evaluate(lazy, 2 * dtype.nbytes(256)) == b"".join(apart)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_grain_of_the_input_is_kept(dtype: DType) -> None:
    tensor, values = stored(np.random.default_rng(2).standard_normal((7, 100), np.float32))
    rows = LazyTensor.make(Slice(1, 3, 99), tensor)
    lazy = quantized(rows, dtype)
    assert (rows.grain, lazy.grain) == (96 * 4, 3 * dtype.block[1])
    assert evaluate(lazy, 50) == reference(np.ascontiguousarray(values[:, 3:99]), dtype)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e10])
@pytest.mark.parametrize("dtype", QUANTIZERS)
def test_what_is_no_weight_is_refused(dtype: DType, wrong: float) -> None:
    values = np.ones((4, 256), np.float32)
    values[2, 40] = wrong
    for importance in (None, np.zeros(256, np.float32)):
        with pytest.raises(CorruptInput, match=f"to {dtype.value}: a value is not a number, infinite or far too large"):
            evaluate(quantized(stored(values)[0], dtype, importance))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_importance_that_is_none_is_refused(wrong: float) -> None:
    importance = np.ones((2, 256), np.float32)
    importance[1, 7] = wrong
    lazy = quantized(stored(np.ones((2, 3, 256), np.float32))[0], DType.Q4_K, importance)
    with pytest.raises(CorruptInput, match="a value is negative, not a number or infinite"):
        evaluate(lazy)


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
    with pytest.raises(IncompatibleInputs, match="q6_k takes rows of a multiple of 256"):
        quantized(zeros(DType.F32, 2, 128), DType.Q6_K)
    for importance in (np.ones(32), np.ones((2, 64)), np.ones((1, 1, 64))):
        with pytest.raises(IncompatibleInputs, match=r"it must be float32 \[64\]$"):
            quantized(zeros(DType.F32, 2, 64), DType.Q4_0, importance)
    with pytest.raises(IncompatibleInputs, match=r"it must be float32 \[64\] or float32 \[2, 64\] or float32 \[128\]$"):
        quantized(zeros(DType.F32, 2, 3, 64), DType.Q4_0, np.ones((3, 64)))


def test_what_is_read_but_not_written_is_refused_with_the_nearest() -> None:
    blocks = {dtype for dtype in DType if dtype.block[0] >= 32}
    assert blocks == {*QUANTIZERS, *NEAREST}
    assert set(NEAREST.values()) <= set(QUANTIZERS)
    with pytest.raises(IncompatibleInputs, match="to iq3_xxs: that type is read, not written") as caught:
        quantized(stored(np.zeros((2, 256)))[0], DType.IQ3_XXS)
    assert caught.value.hint == "q3_k is the nearest that is"


def test_it_survives_json() -> None:
    lazy = quantized(stored(np.zeros((2, 32), np.float32))[0], DType.Q4_0)
    assert LazyTensor.from_json(lazy.to_json()) == lazy
