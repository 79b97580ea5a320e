"""Integers in every container: read again they are what was written, whatever the sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import evaluate, evaluate_all

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs
from weightops.formats.quantized.containers import (
    Container,
    awq_config,
    compressed_config,
    compressed_weights,
    refuse_module,
    write_integers,
)
from weightops.formats.quantized.gptq import QuantizeConfig
from weightops.formats.quantized.table import find_weights
from weightops.formats.quantized.weights import Integers
from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType


def given_array(values: np.ndarray, dtype: DType) -> LazyTensor:
    return LazyTensor.make(Given(dtype, values.shape, values.tobytes()))


def config_of(to: Container, bits: int, size: int, columns: int, symmetric: bool) -> dict[str, Any]:
    if to == "awq":
        return awq_config(size, [])
    if to == "compressed-tensors":
        weights = compressed_weights(bits, size if size < columns else None, symmetric=symmetric)
        return compressed_config([(weights, ["Linear"])], [])
    return QuantizeConfig(bits=bits, group_size=size, sym=symmetric, checkpoint_format=to).to_json()


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["gptq", "gptq_v2", "awq", "compressed-tensors"]),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([5, 8, 16, 32, 40]),
    st.booleans(),
    st.integers(0, 2**32),
    st.integers(200, 2000),
)
def test_what_is_written_is_what_is_read(
    to: Container, bits: int, rows: int, groups: int, size: int, symmetric: bool, seed: int, block: int
) -> None:
    rows, size = {"awq": (rows * 8, size), "compressed-tensors": (rows, size)}.get(to, (rows * 32, 32))
    bits = 4 if to == "awq" else bits
    columns = groups * size
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    zeros = random.integers(to == "gptq", 1 << bits, (rows, groups)).astype(np.uint8)
    if symmetric:
        zeros[:] = 1 << bits - 1
    elif (zeros == zeros[0, 0]).all():
        zeros[0, 0] ^= 1 if zeros[0, 0] > 1 else 3
    scales = random.uniform(0.001, 0.1, (rows, groups)).astype(np.float16)
    integers = Integers(
        given_array(codes, DType.U8), given_array(scales, DType.F16), given_array(zeros, DType.U8), bits, size
    )
    tensors = write_integers("m", integers, to, symmetric=symmetric)
    config = {"quantization_config": config_of(to, bits, size, columns, symmetric)}
    stored = {name: given_bytes(tensor, block) for name, tensor in tensors.items()}
    weight = find_weights(Checkpoint("x", stored, {"config.json": written_json(config)}), evaluate_all).weights[
        "m.weight"
    ]
    found = weight.integers
    assert found is not None
    assert (found.bits, found.group_size) == (bits, size)
    assert evaluate(found.codes, block) == codes.tobytes()
    assert evaluate(found.scales, block) == scales.tobytes()
    if found.zeros is None:
        assert symmetric
    else:
        assert evaluate(found.zeros, block) == zeros.tobytes()
    wide = (codes.astype(np.float32) - zeros.repeat(size, 1)) * scales.astype(np.float32).repeat(size, 1)
    assert evaluate(weight.in_dtype(DType.F32)) == wide.tobytes()


def given_bytes(tensor: LazyTensor, block: int) -> LazyTensor:
    """The tensor as it is stored."""
    return LazyTensor.make(Given(tensor.spec.dtype, tensor.spec.shape, bytes(evaluate(tensor, block))))


@pytest.mark.parametrize(
    ("to", "bits", "inputs", "outputs", "size", "in_order", "said"),
    [
        ("awq", 3, 64, 64, 32, True, "has 3 bits, awq holds 4"),
        ("compressed-tensors", 5, 64, 64, 32, True, "has 5 bits, compressed-tensors holds 2 or 3 or 4 or 8"),
        ("awq", 4, 64, 12, 32, True, "has 12 outputs, awq holds multiples of 8"),
        ("gptq", 4, 48, 64, 16, True, "has 48 inputs and 64 outputs, gptq holds multiples of 32"),
        ("awq", 4, 96, 64, 64, True, "has 96 inputs in groups of 64"),
        ("compressed-tensors", 4, 64, 64, 32, False, "act-order"),
    ],
)
def test_what_a_container_has_no_form_for_is_refused(
    to: Container, bits: int, inputs: int, outputs: int, size: int, in_order: bool, said: str
) -> None:
    with pytest.raises(IncompatibleInputs, match=said) as caught:
        refuse_module("m", to, bits, inputs, outputs, size, in_order=in_order)
    assert caught.value.hint
