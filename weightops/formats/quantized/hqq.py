"""HQQ: groups of one axis with a floating-point scale and zero point, packed by planes of groups.

For a module P: `P.W_q`, `P.scale`, `P.zero`, and its settings as tensors (`shape`, `nbits`, `group_size`, `axis`, and
texts as bytes). Source: hqq 0.2.8 (`core/quantize.py`, `core/bitpack.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from weightops.errors import IncompatibleInputs
from weightops.formats.quantized.weights import FLOATS, NATIVE, NumberFormat, QuantizedWeight, View
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.arrange import cut
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import Affine
from weightops.ops.numbers.codes import RowCodes, held
from weightops.ops.transpose import transposed
from weightops.spec import DType

_SHIFTS: Mapping[int, tuple[int, ...]] = {
    4: (4, 0),
    2: (6, 4, 2, 0),
    1: (7, 6, 5, 4, 3, 2, 1, 0),
    3: tuple(range(27, -1, -3)),
}
_TEXTS = ("compute_dtype", "packing", "unpack_view_dtype")
_FLAGS = (
    *("channel_wise", "encoded_state_dict", "offload_meta", "optimize", "quant_scale", "quant_zero", "round_zero"),
    *("stores_quant_config", "view_as_float"),
)
_NUMBERS = ("shape", "nbits", "group_size", "axis")


def find(view: View) -> Iterator[QuantizedWeight]:
    """The quantised modules; raises `IncompatibleInputs` for scales that are quantised themselves."""
    prefixes = view.ending(".W_q")
    wanted = [f"{p}.{part}" for p in prefixes for part in (*_NUMBERS, "quant_scale", "quant_zero", "view_as_float")]
    small = view.read(name for name in wanted if view.get(name) is not None)
    for prefix in prefixes:
        yield _module(view, prefix, small)


def _module(view: View, prefix: str, small: Mapping[str, bytes]) -> QuantizedWeight:
    name = f"{prefix}.weight"
    packed = view.part(f"{prefix}.W_q", name, [DType.U8, DType.I32], 2)
    scales, zeros = (view.part(f"{prefix}.{part}", name, FLOATS) for part in ("scale", "zero"))
    for flag in ("quant_scale", "quant_zero", "view_as_float"):
        if any(small.get(f"{prefix}.{flag}", b"")):
            raise IncompatibleInputs(
                f"{view.where}: {escape(prefix)} was quantised with {flag}, which is not read",
                hint="dequantise it with hqq",
            )
    shape, bits, axis = (_numbers(view, f"{prefix}.{part}", small) for part in ("shape", "nbits", "axis"))
    if len(shape) != 2 or len(bits) != 1 or len(axis) != 1 or min(shape) < 1 or axis[0] not in (0, 1):
        raise view.misfit(f"{prefix}.shape", "is no shape of a matrix, or nbits and axis are no numbers")
    planes = _SHIFTS.get(bits[0])
    if planes is not None:
        if (packed.spec.dtype is DType.I32) != (bits[0] == 3):
            raise view.misfit(f"{prefix}.W_q", f"is {packed.spec}, expected {bits[0]} bits in int32 for 3, or in uint8")
        packed = LazyTensor.make(RowCodes(bits[0], planes, planes=True), packed)
    elif bits[0] != 8 or packed.spec.dtype is not DType.U8:
        raise view.misfit(f"{prefix}.nbits", f"is {bits[0]}, expected 1, 2, 3, 4 or 8")
    count, per_word = math.prod(shape), len(planes or (0,))
    size = count // scales.spec.numel if scales.spec.numel else 0
    rows = count // packed.spec.shape[1]
    if (
        zeros.spec != scales.spec
        or rows * packed.spec.shape[1] != count
        or not rows <= packed.spec.shape[0] < rows + per_word
    ):
        raise view.misfit(f"{prefix}.W_q", f"holds {packed.spec} with scales {scales.spec} for a weight {shape}")
    expected = (scales.spec.numel, size) if axis[0] else (size, scales.spec.numel)
    codes = cut(packed, 0, 0, rows)
    if size * scales.spec.numel != count or codes.spec.shape != expected:
        raise view.misfit(f"{prefix}.W_q", f"holds {codes.spec} with {scales.spec.numel} scales for a weight {shape}")
    if not axis[0]:  # a group is a column
        codes = held(transposed(codes))
    grid = (scales.spec.numel, 1)
    native = scales.spec.dtype

    def value(dtype: DType, steps: bool) -> LazyTensor:
        rounded = native if dtype is native and native in NATIVE else None
        op = Affine(name, dtype, (1, size), ("zeros",), rounded=rounded, is_signed=True, steps=steps)
        made = LazyTensor.make(op, codes, reshaped(scales, grid), reshaped(zeros, grid))
        return reshaped(made if axis[0] else transposed(made), (shape[0], shape[1]))

    kept = (*_NUMBERS, *_TEXTS, *_FLAGS)
    parts = {part: f"{prefix}.{part}" for part in ("W_q", "scale", "zero")}
    parts |= {part: f"{prefix}.{part}" for part in kept if view.get(f"{prefix}.{part}") is not None}
    return QuantizedWeight(name, "hqq", f"hqq, {bits[0]} bits, groups of {size}", parts, native, value)


def _numbers(view: View, name: str, small: Mapping[str, bytes]) -> list[int]:
    """A setting that is stored as a tensor of integers."""
    import numpy as np

    data = small.get(name)
    dtype = view.checkpoint[name].spec.dtype if data is not None else None
    if data is None or dtype not in (DType.I32, DType.I64, DType.U8) or len(data) > 64:
        raise view.misfit(name, "is not there, or no tensor of integers")
    return [int(n) for n in np.frombuffer(data, dtype.value)]


HQQ = NumberFormat(
    "hqq", frozenset({"hqq"}), find, tuple(f".{part}" for part in ("scale", "zero", *_NUMBERS, *_TEXTS, *_FLAGS))
)
