"""Weights in few bits: MXFP4 against compressed-tensors, blocks in float8 against the arithmetic in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import evaluate, from_bytes, given_tensor, to_bytes, torch_dtype

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops import fp8, mxfp4
from weightops.ops.fp8 import SCALED, block_fp8
from weightops.ops.measures.loss import Loss, losses_of
from weightops.ops.transpose import transposed
from weightops.spec import DType

SIZES = (1.0, 0.02, 1e-4, 1e-7, 1e-38, 1e30)


def drawn(shape: tuple[int, ...], dtype: DType, size: float, seed: int) -> torch.Tensor:
    """Numbers of a size, with smaller ones and zeros of either sign among them."""
    size = min(size, 4000.0) if dtype is DType.F16 else size
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    x[seed % 5 :: 5] *= torch.tensor([0.0, -0.0, 1e-3, 1e-6])[seed % 4]
    return x.to(torch_dtype(dtype))


def values(tensor: LazyTensor, block: int) -> torch.Tensor:
    return from_bytes(evaluate(tensor, block), torch_dtype(tensor.spec.dtype), tensor.spec.shape)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(mxfp4.DTYPES), st.integers(1, 9), st.integers(1, 3), st.sampled_from(SIZES), st.integers(0, 2**32)
)
def test_codes_and_exponents_are_those_of_compressed_tensors(
    dtype: DType, rows: int, groups: int, size: float, seed: int
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is the reference for its own format")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    x = drawn((rows, groups * 32), dtype, size, seed)
    settings: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    arguments = QuantizationArgs(**settings, symmetric=True, scale_dtype=torch.uint8)
    grouped = x.reshape(rows, groups, 32)
    scale, _ = calculate_qparams(grouped.amin(2), grouped.amax(2), arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    expected = MXFP4PackedCompressor.compress({"weight": x, "weight_scale": scale}, scheme)
    codes, exponents = mxfp4.mxfp4(given_tensor(x), "x")
    assert torch.equal(values(codes, 48), expected["weight_packed"])
    assert torch.equal(values(exponents, 5), expected["weight_scale"])


def test_the_exponent_is_the_next_from_seven_quarters_on_and_nothing_overflows() -> None:
    tops = [1.0, 1.7421875, 1.75, 1.9921875, 57344.0, 65504.0]
    x = torch.zeros(len(tops), 32, dtype=torch.float16)
    x[:, 0] = torch.tensor(tops)
    codes, exponents = mxfp4.mxfp4(given_tensor(x), "x")
    assert values(exponents, 6).flatten().tolist() == [125, 125, 126, 126, 141, 141]
    # 57344 over 2^14 is half way between 3 and 4, and as others like it 4, whose code is even.
    assert values(codes, 96)[:, 0].tolist() == [6, 7, 6, 6, 6, 6]


@pytest.mark.parametrize("dtype", mxfp4.DTYPES)
def test_what_four_bits_lose_is_counted(dtype: DType) -> None:
    x = drawn((40, 96), dtype, 0.02, 3)
    codes, exponents = mxfp4.mxfp4(given_tensor(x), "x")
    buffer = memoryview(bytearray(codes.nbytes))
    with Evaluator() as read:
        for start in range(0, codes.nbytes, 160):
            read(codes, start, buffer[start : start + 160])
        found = losses_of([codes], read)["x"]
    scales = torch.exp2(values(exponents, 64).double() - 127).repeat_interleave(32, 1)
    over = x.double() / scales
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    packed = torch.frombuffer(buffer, dtype=torch.uint8).reshape(40, 48)
    rounded = table[torch.stack([packed & 7, packed >> 4 & 7], 2).reshape(40, 96).long()]
    assert found == Loss(
        elements=x.numel(),
        changed=int((rounded != over.abs()).sum()),
        flushed=int(((rounded == 0) & (over != 0)).sum()),
        subnormal=int((rounded == 0.5).sum()),
        max_relative_error=1.0,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCALED),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(SIZES),
    st.integers(0, 2**32),
    st.data(),
)
def test_blocks_are_computed_in_float32(
    dtype: DType, high: int, wide: int, size: float, seed: int, data: st.DataObject
) -> None:
    x = drawn((8 * high, 8 * wide), dtype, size, seed)
    x[:8, :8] *= seed % 2
    largest = x.float().reshape(high, 8, wide, 8).abs().amax((1, 3))
    scale = (largest / 448).clamp(min=torch.finfo(torch.float32).tiny)
    scale[largest == 0] = 1.0
    over = x.float() / scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
    given_x = given_tensor(x) if seed % 3 else transposed(given_tensor(x.T.contiguous()))
    codes, scales = block_fp8(given_x, 8, "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "_BLOCK", data.draw(st.integers(1, 300)))
        patch.setattr(fp8, "_PIECE", data.draw(st.integers(1, 300)))
        block = data.draw(st.integers(1, 500))
        assert torch.equal(values(scales, block), scale)
        assert evaluate(codes, block) == to_bytes(over.clamp(-448, 448).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_no_number_is_refused_by_name(value: float) -> None:
    x = torch.ones(8, 32)
    x[3, 5] = value
    for made in (*block_fp8(given_tensor(x), 8, "m.x"), *mxfp4.mxfp4(given_tensor(x), "m.x")):
        with pytest.raises(IncompatibleInputs, match=r"m\.x holds a NaN or an infinity") as caught:
            evaluate(made)
        assert caught.value.hint == "--keep m.x leaves it as it is"


def test_what_is_no_whole_block_is_refused() -> None:
    with pytest.raises(IncompatibleInputs, match="no matrix of blocks of 8"):
        block_fp8(given_tensor(torch.ones(8, 12)), 8, "x")
    with pytest.raises(IncompatibleInputs, match="rows of whole groups of 32"):
        mxfp4.mxfp4(given_tensor(torch.ones(8, 40)), "x")
