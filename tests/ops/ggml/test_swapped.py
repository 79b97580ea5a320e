"""Blocks of big-endian machines: against the structures of ggml-common.h, as numpy turns them round."""

from __future__ import annotations

import numpy as np
import pytest
from support import evaluate

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.ggml.swapped import Swapped
from weightops.ops.rows import Given
from weightops.spec import DType

D, DM = [("d", "<u2")], [("dm", "<u2", 2)]
STRUCTURES = {
    DType.Q4_0: [*D, ("qs", "u1", 16)],
    DType.Q4_1: [*DM, ("qs", "u1", 16)],
    DType.Q5_0: [*D, ("qh", "<u4"), ("qs", "u1", 16)],
    DType.Q5_1: [*DM, ("qh", "<u4"), ("qs", "u1", 16)],
    DType.Q8_0: [*D, ("qs", "u1", 32)],
    DType.Q8_1: [*DM, ("qs", "u1", 32)],
    DType.Q2_K: [("scales", "u1", 16), ("qs", "u1", 64), *DM],
    DType.Q3_K: [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), *D],
    DType.Q4_K: [*DM, ("scales", "u1", 12), ("qs", "u1", 128)],
    DType.Q5_K: [*DM, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)],
    DType.Q6_K: [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "u1", 16), *D],
    DType.Q8_K: [("d", "<u4"), ("qs", "u1", 256), ("bsums", "<u2", 16)],
    DType.IQ1_S: [*D, ("qs", "u1", 32), ("qh", "<u2", 8)],
    DType.IQ1_M: [("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)],
    DType.IQ2_XS: [*D, ("qs", "<u2", 32), ("scales", "u1", 8)],
    DType.IQ2_S: [*D, ("qs", "u1", 64), ("qh", "u1", 8), ("scales", "u1", 8)],
    DType.IQ3_XXS: [*D, ("qs", "u1", 64), ("signs", "<u4", 8)],
    DType.IQ3_S: [*D, ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)],
    DType.IQ4_NL: [*D, ("qs", "u1", 16)],
    DType.IQ4_XS: [*D, ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)],
    DType.TQ1_0: [("qs", "u1", 48), ("qh", "u1", 4), *D],
    DType.TQ2_0: [("qs", "u1", 64), *D],
    DType.MXFP4: [("e", "u1"), ("qs", "u1", 16)],
    DType.NVFP4: [("d", "u1", 4), ("qs", "u1", 32)],
    DType.Q1_0: [*D, ("qs", "u1", 16)],
    DType.Q2_0: [*D, ("qs", "u1", 16)],
    DType.F32: [("value", "<u4")],
    DType.I64: [("value", "<u8")],
    DType.I8: [("value", "u1")],
}


@pytest.mark.parametrize("kind", STRUCTURES, ids=lambda dtype: dtype.name)
def test_each_number_of_a_block_is_turned_round(kind: DType) -> None:
    structure = np.dtype(STRUCTURES[kind])  # type: ignore[arg-type]
    count, nbytes = kind.block if kind.is_packed else (1, kind.itemsize)
    assert structure.itemsize == nbytes
    data = np.random.default_rng(0).bytes(7 * nbytes)
    big = np.frombuffer(data, structure).astype(structure.newbyteorder(">")).tobytes()
    tensor = LazyTensor.make(Swapped(), LazyTensor.make(Given(kind, (7 * count,), big)))
    assert evaluate(tensor) == data
    assert evaluate(tensor, 13) == data


def test_the_type_that_mixes_sizes_is_refused() -> None:
    with pytest.raises(IncompatibleInputs, match="iq2_xxs"):
        LazyTensor.make(Swapped(), LazyTensor.make(Given(DType.IQ2_XXS, (256,), bytes(66))))
