"""The values of ggml's blocks, to the bit: against gguf, against what C gave, and against the definitions in words."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import evaluate, from_bytes

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.ggml.values import BlockValues, has_steps
from weightops.ops.rows import Given
from weightops.spec import DType

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "ggml" / "blocks.json").read_text())
BLOCK_TYPES = [dtype for dtype in DType if dtype.is_block]
KINDS = pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda dtype: dtype.name)
NOT_IN_NUMPY = (DType.Q8_1, DType.Q8_K, DType.Q1_0, DType.Q2_0)


def stored(kind: DType, data: bytes) -> LazyTensor:
    count, nbytes = kind.block
    return LazyTensor.make(Given(kind, (len(data) // nbytes * count,), data))


def values(kind: DType, data: bytes, **options: DType | bool) -> LazyTensor:
    return LazyTensor.make(BlockValues(**options), stored(kind, data))  # type: ignore[arg-type]


def random_blocks(kind: DType, count: int, seed: int = 0) -> bytes:
    """Any bits at all: scales that are subnormal, infinite or NaN among them."""
    return np.random.default_rng(seed).bytes(count * kind.block[1])


def half(block: bytes, at: int = 0) -> np.float32:
    return np.frombuffer(block, "<f2", 1, at)[0].astype(np.float32)


def by_definition(kind: DType, block: bytes) -> list[np.float32]:
    """One block, element by element, as ggml's C code has it."""
    if kind is DType.Q8_K:
        return [np.frombuffer(block, "<f4", 1)[0] * np.float32(q) for q in np.frombuffer(block, np.int8, 256, 4)]
    scale = half(block)
    if kind is DType.Q8_1:
        return [scale * np.float32(q) for q in np.frombuffer(block, np.int8, 32, 4)]
    if kind is DType.Q1_0:
        return [scale if block[2 + j // 8] >> j % 8 & 1 else -scale for j in range(128)]
    return [np.float32((block[2 + j // 4] >> j % 4 * 2 & 3) - 1) * scale for j in range(64)]


@KINDS
def test_any_blocks_are_what_gguf_makes_of_them(kind: DType) -> None:
    data = random_blocks(kind, 700)
    with np.errstate(all="ignore"):
        if kind in NOT_IN_NUMPY:
            size = kind.block[1]
            found = [by_definition(kind, data[i : i + size]) for i in range(0, len(data), size)]
            expected = np.array(found, np.float32)
        else:
            blocks = np.frombuffer(data, np.uint8).reshape(700, -1)
            expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    assert evaluate(values(kind, data)) == expected.tobytes()


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_values_have_the_digests_of_ggml(name: str, dtype: DType) -> None:
    golden = GOLDEN[name]
    found = evaluate(values(DType(name), base64.b64decode(golden["blocks"]), dtype=dtype))
    assert hashlib.sha256(found).hexdigest() == golden["sha256"][dtype.value]


@given(kind=st.sampled_from(BLOCK_TYPES), count=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_any_range_is_that_of_the_whole(kind: DType, count: int, seed: int, data: st.DataObject) -> None:
    tensor = values(kind, random_blocks(kind, count, seed))
    start = data.draw(st.integers(0, tensor.nbytes - 1))
    part = bytearray(data.draw(st.integers(1, tensor.nbytes - start)))
    with Evaluator() as read:
        read(tensor, start, memoryview(part))
    assert part == evaluate(tensor)[start : start + len(part)]


def test_ranges_beyond_a_piece_are_those_of_the_whole() -> None:
    tensor = values(DType.Q6_K, random_blocks(DType.Q6_K, 700))
    assert evaluate(tensor, 300_000) == evaluate(tensor)


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F64])
@pytest.mark.parametrize("kind", [DType.Q4_0, DType.Q6_K, DType.NVFP4])
def test_other_dtypes_are_rounded_once(kind: DType, dtype: DType) -> None:
    data = random_blocks(kind, 3000)
    exact = from_bytes(evaluate(values(kind, data)), torch.float32, (3000 * kind.block[0],))
    tensor = values(kind, data, dtype=dtype)
    whole = evaluate(tensor)
    found = from_bytes(whole, getattr(torch, dtype.value), tensor.spec.shape)
    assert torch.equal(found.nan_to_num(7), exact.to(found.dtype).nan_to_num(7))
    assert evaluate(tensor, 10_002) == whole


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_TYPES if has_steps(kind)], ids=lambda dtype: dtype.name)
def test_values_of_a_group_are_whole_steps_apart(kind: DType) -> None:
    data = base64.b64decode(GOLDEN[kind.value]["blocks"]) if kind.value in GOLDEN else random_blocks(kind, 8)
    found, steps = (np.frombuffer(evaluate(values(kind, data, steps=s)), np.float32) for s in (False, True))
    with np.errstate(all="ignore"):
        gaps = np.abs(found[1:].astype(np.float64) - found[:-1]) / (steps[1:] / np.float64(1 + 1 / 16))
    same = (steps[1:] == steps[:-1]) & (steps[1:] > 1e-4 * np.abs(found[1:])) & np.isfinite(gaps)
    same[15::16] = False  # the next group may have another minimum
    assert same.sum() > 50
    assert np.abs(gaps[same] - gaps[same].round()).max() < 1e-2
    assert (gaps[same].round() == 1).any() or kind is DType.Q1_0


@pytest.mark.parametrize("kind", [DType.Q8_0, DType.Q4_0])
def test_half_a_step_is_what_rounding_loses(kind: DType) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 96), np.float32)
    data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind.name]).tobytes()
    found, steps = (np.frombuffer(evaluate(values(kind, data, steps=s)), np.float32) for s in (False, True))
    near = np.abs(weights.reshape(-1) - found) <= 0.5 * steps * 1.01
    assert near.mean() > (0.999 if kind is DType.Q8_0 else 0.95)  # what Q4_0 clips is further away


def test_what_has_no_blocks_no_steps_or_no_such_type_is_refused() -> None:
    with pytest.raises(IncompatibleInputs, match="no blocks"):
        LazyTensor.make(BlockValues(), LazyTensor.make(Given(DType.F32, (1,), bytes(4))))
    with pytest.raises(IncompatibleInputs, match="not evenly spaced"):
        values(DType.IQ4_XS, bytes(136), steps=True)
    with pytest.raises(IncompatibleInputs, match="are no int8"):
        values(DType.Q8_0, bytes(34), dtype=DType.I8)
