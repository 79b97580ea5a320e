"""NVFP4 as NVIDIA's Model Optimizer exports it: `weight` of bytes, `weight_scale`, and the factor `weight_scale_2`.

Its FP8 holds weights of 8 bits beside one scale, which `scaled` reads. Source: nvidia-modelopt 0.47,
`export/unified_export_hf.py` and `qtensor/nvfp4_tensor.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from weightops.errors import IncompatibleInputs
from weightops.formats.quantized.weights import FLOATS, NumberFormat, QuantizedWeight, View, affine
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import Affine, ScalesOverOne
from weightops.ops.numbers.codes import Codes
from weightops.spec import DType

_GROUP = 16


def find(view: View) -> Iterator[QuantizedWeight]:
    """The weights with a `weight_scale_2`, also of stacked experts; raises as the other formats do."""
    for name in view.ending("_scale_2"):
        packed = view.part(name, name, [DType.U8])
        scales = view.part(f"{name}_scale", name, [DType.F8_E4M3])
        one = view.need(f"{name}_scale_2", name)
        if view.get(f"{name.rpartition('.')[0]}.pre_quant_scale") is not None:
            raise IncompatibleInputs(
                f"{view.where}: {escape(name)} was scaled for AWQ (pre_quant_scale), which is not undone here",
                hint="take the checkpoint that it was made of",
            )
        columns = 2 * packed.spec.shape[-1]
        if scales.spec.shape != (*packed.spec.shape[:-1], -(-columns // _GROUP)):
            raise view.misfit(f"{name}_scale", f"is {scales.spec} for {packed.spec}, expected groups of {_GROUP}")
        if one.spec.numel != 1 or one.spec.dtype not in FLOATS:
            raise view.misfit(f"{name}_scale_2", f"is {one.spec}, expected one floating-point number")
        factors = LazyTensor.make(ScalesOverOne(name, is_factor=True), scales, reshaped(one, (1,)))
        codes = LazyTensor.make(Codes(4, columns), packed)
        value = affine(partial(_op, name), codes, factors)
        parts = {"weight": name, "scale": f"{name}_scale", "scale_2": f"{name}_scale_2"}
        native = view.model_dtype()
        yield QuantizedWeight(name, "modelopt", f"nvfp4, groups of {_GROUP}", parts, native, value)


def _op(name: str, dtype: DType, steps: bool) -> Affine:
    return Affine(name, dtype, (1, _GROUP), table="e2m1", steps=steps)


MODELOPT = NumberFormat("modelopt", frozenset({"modelopt", "modelopt_fp4", "nvfp4"}), find)
