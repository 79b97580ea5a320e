"""The definition of the format, against bit streams spelt out as Python integers and against its formula."""

from __future__ import annotations

import pytest
import torch
from gptq_layers import random_layer, random_x, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from weightops_kernels import reference
from weightops_kernels.reference import Packed

packings = st.tuples(st.sampled_from(reference.BITS), st.integers(1, 100), st.integers(1, 5), st.integers(0, 99))


def random_values(bits: int, count: int, columns: int, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (count, columns), generator=made, dtype=torch.uint8)


@given(packings)
@settings(max_examples=60, deadline=None)
def test_words_are_the_values_as_one_stream_of_bits(packing: tuple[int, int, int, int]) -> None:
    bits, count, columns, seed = packing
    values = random_values(bits, count, columns, seed)
    words = reference.pack(values, bits)
    for column in range(columns):
        stream = sum(int(v) << (bits * i) for i, v in enumerate(values[:, column]))
        assert stream == sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words[:, column]))
    assert torch.equal(reference.unpack(words, bits, count), values)


def test_words_of_published_symmetric_checkpoints_mean_the_middle() -> None:
    for bits, word, zero in ((4, 0x77777777, 8), (8, 0x7F7F7F7F, 128), (2, 0x55555555, 2)):
        stored = torch.tensor([[word]], dtype=torch.int32)
        assert reference.zero_points(stored, bits, 32 // bits, "gptq").unique().tolist() == [zero]
        assert reference.zero_points(stored, bits, 32 // bits, "gptq_v2").unique().tolist() == [zero - 1]


@pytest.mark.parametrize("checkpoint_format", reference.FORMATS)
@pytest.mark.parametrize("bits", reference.BITS)
def test_weights_are_scale_times_integer_less_zero(bits: int, checkpoint_format: str) -> None:
    layer = random_layer(200, 48, 64, bits, act_order=True, checkpoint_format=checkpoint_format)
    exact = layer.weight().t()
    for dtype in (torch.float64, torch.float32, torch.float16):
        found = reference.dequantize(layer.packed, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, exact.to(dtype))
    x = random_x(3, 200).double()
    assert relative_error(reference.matmul(x, layer.packed), x @ exact.t()) < 1e-14


def test_tensors_that_are_not_one_layer_are_refused() -> None:
    layer = random_layer(64, 32, 32)
    qweight, qzeros, scales, g_idx = layer.tensors
    with pytest.raises(ValueError, match=r"qweight must be int32 \[8, 32\].*found int32 \[7, 32\]"):
        reference.dequantize(Packed(qweight[:7], qzeros, scales, g_idx, 4))
    with pytest.raises(ValueError, match=r"qzeros must be int32 \[2, 4\].*found int64"):
        reference.dequantize(Packed(qweight, qzeros.long(), scales, g_idx, 4))
    with pytest.raises(ValueError, match="bits must be one of"):
        reference.dequantize(Packed(qweight, qzeros, scales, g_idx, 5))
    with pytest.raises(ValueError, match="checkpoint_format must be one of"):
        reference.dequantize(Packed(qweight, qzeros, scales, g_idx, 4, "marlin"))
    with pytest.raises(ValueError, match="scales must be"):
        reference.dequantize(Packed(qweight, qzeros, scales[0], g_idx, 4))
