"""Layers arranged for a CPU: the same integers and weights, and products without the checkpoint's tensors."""

from __future__ import annotations

import pytest
import torch
from gptq_layers import Layer, random_layer, random_x, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from weightops_kernels import cpu, planes, reference
from weightops_kernels.linear import QuantLinear
from weightops_kernels.reference import Packed


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(reference.BITS), st.integers(1, 9), st.integers(1, 90), st.integers(0, 2**32))
def test_planes_unfold_to_what_was_folded(bits: int, rows: int, columns: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, (rows, columns), generator=made, dtype=torch.uint8)
    folded = planes.fold(values, bits)
    assert torch.equal(planes.unfold(folded, bits, columns), values)
    assert folded.shape[1] <= columns * bits / 8 + 2


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize(("k", "n", "group_size"), [(256, 64, 64), (200, 37, 128), (96, 33, -1), (77, 8, 20)])
def test_weights_are_those_of_the_reference_bit_for_bit(
    k: int, n: int, group_size: int, bits: int, act_order: bool
) -> None:
    layer = random_layer(k, n, group_size, bits, act_order, checkpoint_format="gptq_v2")
    found = planes.arrange(layer.packed)
    assert found is not None
    expected = reference.dequantize(layer.packed)
    rows = torch.arange(k) if found.rows is None else found.rows
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parts = [slice(i, min(i + 5, n)) for i in range(0, n, 5)]
        weights = [some.clone() for _, some in found.weights(parts, dtype)]
        assert torch.equal(torch.cat(weights), expected.to(dtype)[:, rows])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 20])
def test_products_need_no_tensors_of_the_checkpoint(rows: int, scale_dtype: torch.dtype) -> None:
    qweight, qzeros, scales, g_idx = random_layer(300, 40, 100, act_order=True).tensors
    tensors = qweight, qzeros, scales.to(scale_dtype), g_idx
    exact = reference.dequantize(Packed(*tensors), torch.float64)
    module = QuantLinear.from_tensors(*tensors, 4).prepare("cpu", release=True)
    assert all(getattr(module, name).numel() == 0 for name in ("qweight", "qzeros", "scales", "g_idx"))
    x = random_x(rows, 300)
    for dtype, tolerance in (
        (torch.float16, 1e-3),
        (torch.bfloat16, 1e-2),
        (torch.float32, 1e-6),
        (torch.float64, 1e-13),
    ):
        found = module(x.to(dtype))
        assert found.dtype == dtype
        assert found.shape == (rows, 40)
        if rows:
            assert relative_error(found, x.double() @ exact.t()) < tolerance
    with pytest.raises(ValueError, match="were released"):
        module.prepare("reference")


def test_groups_of_unequal_lengths_keep_the_tensors_of_the_checkpoint() -> None:
    layer = random_layer(128, 32, 32)
    g_idx = torch.tensor([0] * 10 + [1] * 60 + [2] * 50 + [3] * 8, dtype=torch.int32)
    uneven = Layer(layer.q, layer.zeros, layer.scales, g_idx, 4, "gptq")
    assert planes.arrange(uneven.packed) is None
    module = QuantLinear.from_tensors(*uneven.tensors, 4).prepare("cpu", release=True)
    x = random_x(3, 128).float()
    assert relative_error(module(x), x.double() @ uneven.weight()) < 1e-6


def test_rearranging_a_few_outputs_at_a_time_is_torchs_own_layout() -> None:
    """That lays 64 or 32 outputs together, and the rest at the end in another way."""
    layer = random_layer(128, 2 * 512 + 48, 64, act_order=True)
    found = cpu.prepare_int4(layer.packed)
    q = layer.q[found.rows].t().to(torch.int32).contiguous()
    assert torch.equal(found.packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2))


def test_a_released_four_bit_layer_takes_any_number_of_rows_of_bfloat16_alone() -> None:
    layer = random_layer(128, 64, 64)
    module = QuantLinear.from_tensors(*layer.tensors, 4).prepare("cpu-int4", torch.bfloat16, release=True)
    x = random_x(cpu.INT4_MAX_ROWS + 1, 128).bfloat16()
    assert relative_error(module(x), x.double() @ layer.weight()) < 1e-2
    with pytest.raises(ValueError, match="kept for bfloat16 alone; found float32"):
        module(x.float())
