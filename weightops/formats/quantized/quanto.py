"""optimum-quanto: `W._data` with `W._scale`, and of 2 and 4 bits groups of rows, packed by planes, with `W._shift`.

quanto_qmap.json says which module is what; the shape of a packed weight is that of its module, which no file says and
the model does. Source: optimum-quanto 0.2.7 (`tensor/packed.py`, `tensor/grouped.py`, `tensor/weights/qbits.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from weightops.errors import IncompatibleInputs
from weightops.formats.quantized.scaled import scaled_weight
from weightops.formats.quantized.weights import FLOATS, NATIVE, NumberFormat, QuantizedWeight, View
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.arrange import cut
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import Affine, Role
from weightops.ops.numbers.codes import RowCodes
from weightops.spec import DType


def find(view: View) -> Iterator[QuantizedWeight]:
    """The quantised weights; raises `IncompatibleInputs` where nothing says the shape of a packed one."""
    for name in view.ending("._data._data"):
        yield _packed(view, name)
    for name in view.ending("._data"):
        parts = {"weight": f"{name}._data", "scale": f"{name}._scale"}
        yield scaled_weight(view, name, parts, "quanto", view.need(parts["scale"], name).spec.dtype)


def _packed(view: View, name: str) -> QuantizedWeight:
    parts = {"data": f"{name}._data._data", "scale": f"{name}._scale", "shift": f"{name}._shift"}
    packed = view.part(parts["data"], name, [DType.U8], 2)
    scales = view.part(parts["scale"], name, FLOATS)
    shifts = view.part(parts["shift"], name, (*FLOATS, DType.I8, DType.U8))
    modules = view.settings.get("modules")
    about = modules.get(name.removesuffix(".weight")) if isinstance(modules, dict) else None
    kind = about.get("weights") if isinstance(about, dict) else None
    bits = 2 if kind == "qint2" else 4
    shape = view.shape_of(name)
    if shape is None:
        raise IncompatibleInputs(
            f"{view.where}: nothing says the shape of {escape(name)}, which quanto packs without it",
            hint="config.json must name a model that transformers knows",
        )
    count, groups = math.prod(shape), scales.spec.numel
    if shifts.spec.shape != scales.spec.shape:
        raise view.misfit(parts["shift"], f"is {shifts.spec}, expected the shape of the scales {scales.spec}")
    size = packed.spec.shape[1]
    planes = tuple(range(0, 8, bits))
    if groups * size != count or -(-groups // len(planes)) != packed.spec.shape[0]:
        raise view.misfit(parts["data"], f"is {packed.spec} with {groups} groups, for a weight {list(shape)}")
    codes = cut(LazyTensor.make(RowCodes(bits, planes, planes=True), packed), 0, 0, groups)
    is_float = shifts.spec.dtype.is_float
    native = scales.spec.dtype
    role: Role = "shifts" if is_float else "zeros"

    def value(dtype: DType, steps: bool) -> LazyTensor:
        rounded = native if is_float and dtype is native and native in NATIVE else None
        op = Affine(name, dtype, (1, size), (role,), rounded=rounded, is_signed=True, steps=steps)
        made = LazyTensor.make(op, codes, reshaped(scales, (groups, 1)), reshaped(shifts, (groups, 1)))
        return reshaped(made, shape)

    return QuantizedWeight(name, "quanto", f"quanto, {bits} bits, groups of {size}", parts, native, value)


QUANTO = NumberFormat("quanto", frozenset({"quanto"}), find, ("._scale", "._shift"))
