"""What layers are rearranged into holds the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gptq_layers import Layer, random_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from weightops_kernels import layout, reference
from weightops_kernels.layout import Repacked
from weightops_kernels.reference import Packed


def rows_of(weight: Repacked) -> torch.Tensor:
    """float64 weights `[kernel_rows, N]` in the layout's order."""
    padded = len(weight.chunk_group) * layout.CHUNK
    if weight.interleaved:
        q = layout.deinterleave(weight.words)[:padded]
    else:
        q = reference.unpack(weight.words, weight.bits, padded)
    group = weight.chunk_group.long().repeat_interleave(layout.CHUNK)
    exact = weight.scales.double()[group] * (q.double() - weight.zeros.double()[group])
    return exact[: weight.kernel_rows]


def assert_same(layer: Layer, weight: Repacked) -> None:
    identity = torch.eye(weight.in_features, dtype=torch.float64)
    assert torch.equal(weight.arrange(identity) @ rows_of(weight), layer.weight())


@given(
    k=st.integers(1, 400),
    n=st.integers(1, 20),
    group_size=st.sampled_from([-1, 32, 64, 96, 128, 24, 100]),
    bits=st.sampled_from(reference.BITS),
    act_order=st.booleans(),
    checkpoint_format=st.sampled_from(reference.FORMATS),
)
@settings(max_examples=60, deadline=None)
def test_repacked_layers_have_the_same_weights(
    k: int, n: int, group_size: int, bits: int, act_order: bool, checkpoint_format: str
) -> None:
    layer = random_layer(k, n, group_size, bits, act_order, checkpoint_format)
    weight = layout.repack(layer.packed)
    assert_same(layer, weight)
    assert weight.out_features == n
    if group_size % 32 == 0 and k > group_size:
        assert weight.group_size == group_size
        assert weight.kernel_rows == k


def test_groups_of_any_lengths_and_empty_ones() -> None:
    layer = random_layer(160, 8, 32)
    uneven = dataclasses.replace(layer, g_idx=torch.tensor([0] * 3 + [4] * 90 + [1] * 67).to(torch.int32))
    weight = layout.repack(uneven.packed)
    assert weight.group_size == -1
    assert_same(uneven, weight)


def test_a_nibble_and_the_fourth_after_it_are_adjacent_rows() -> None:
    q = torch.arange(256, dtype=torch.int64).remainder(13).to(torch.uint8)[:, None]
    words = layout.interleave(q)
    for block in range(2):
        for i in range(16):
            for j in range(4):
                row = 128 * block + 32 * j + 2 * i
                word = int(words[block, 0, i]) & 0xFFFFFFFF
                assert (word >> 4 * j) & 15 == q[row, 0]
                assert (word >> 4 * (j + 4)) & 15 == q[row + 1, 0]
    assert torch.equal(layout.deinterleave(words), q)


def test_columns_of_x_stay_where_they_are_when_groups_are_in_order() -> None:
    assert layout.repack(random_layer(256, 8, 64).packed).rows is None
    shuffled = layout.repack(random_layer(256, 8, 64, act_order=True).packed)
    assert shuffled.rows is not None
    assert sorted(shuffled.rows.tolist()) == list(range(256))


def test_a_group_that_is_not_there_is_refused() -> None:
    qweight, qzeros, scales, g_idx = random_layer(64, 8, 32).tensors
    with pytest.raises(ValueError, match=r"g_idx must lie in 0\.\.1; found 0\.\.2"):
        layout.repack(Packed(qweight, qzeros, scales, torch.where(g_idx == 1, 2, g_idx), 4))
