"""MXFP4 as gpt-oss publishes its experts: `NAME_blocks` `[e, n, k / 32, 16]` and `NAME_scales` `[e, n, k / 32]`.

The weight `NAME` is `[e, k, n]`, as transformers keeps it. Source: `convert_moe_packed_tensors` of transformers 5.23
(`integrations/mxfp4.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from weightops.formats.quantized.weights import NumberFormat, QuantizedWeight, View
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import Affine
from weightops.ops.numbers.codes import Codes
from weightops.ops.transpose import transposed
from weightops.spec import DType

_GROUP = 32


def find(view: View) -> Iterator[QuantizedWeight]:
    """The weights that are stored in blocks; raises `CorruptInput` for blocks and scales that do not fit."""
    for name in view.ending("_blocks"):
        if view.method != "mxfp4" and view.get(f"{name}_scales") is None:
            continue
        blocks = view.part(f"{name}_blocks", name, [DType.U8])
        scales = view.part(f"{name}_scales", name, [DType.U8, DType.F8_E8M0])
        shape = blocks.spec.shape
        if len(shape) != 4 or shape[-1] != _GROUP // 2 or scales.spec.shape != shape[:-1]:
            raise view.misfit(f"{name}_blocks", f"is {blocks.spec} with scales {scales.spec}, expected [e, n, g, 16]")
        flat = reshaped(blocks, (*shape[:-2], shape[-2] * shape[-1]))
        codes = LazyTensor.make(Codes(4, shape[-2] * _GROUP), flat)
        exponents = reshaped(scales, scales.spec.shape, DType.F8_E8M0)

        def value(
            dtype: DType, steps: bool, name: str = name, inputs: tuple[LazyTensor, ...] = (codes, exponents)
        ) -> LazyTensor:
            return transposed(LazyTensor.make(Affine(name, dtype, (1, _GROUP), table="e2m1", steps=steps), *inputs))

        parts = {"blocks": f"{name}_blocks", "scales": f"{name}_scales"}
        native = view.model_dtype()
        yield QuantizedWeight(name, "mxfp4", f"mxfp4, groups of {_GROUP}", parts, native, value)


MXFP4 = NumberFormat("mxfp4", frozenset({"mxfp4"}), find, ("_blocks", "_scales"))
