"""bitsandbytes: NF4 and FP4 in blocks that run through the whole tensor, once or twice quantised, and int8 by rows.

Of 4 bits, for a weight W: `W` uint8 `[n / 2, 1]`, `W.absmax`, `W.quant_map`, and `W.quant_state.bitsandbytes__nf4` (or
fp4), which is JSON. Of 8: `P.weight` int8, `P.SCB`, the largest magnitude of each row. Source: bitsandbytes 0.50
(`functional.py`: `QuantState`, `dequantize_4bit`, `int8_vectorwise_dequant`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from weightops.formats.quantized.weights import FLOATS, NATIVE, NumberFormat, QuantizedWeight, View, affine
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import DTYPES, Affine
from weightops.ops.numbers.codes import Codes
from weightops.ops.rows import Given
from weightops.spec import DType

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_NBYTES = 1 << 16
_ONE_127TH = 7.874015718698502e-3
"""What `int8_vectorwise_dequant` multiplies by after the row's largest magnitude: 1/127 in float32."""


def find(view: View) -> Iterator[QuantizedWeight]:
    """The weights of 4 and 8 bits; raises `CorruptInput` for states that do not describe their weights."""
    states = [name for name in view if _STATE in name]
    for name in states:
        if view.checkpoint[name].nbytes > _MAX_STATE_NBYTES:
            raise view.misfit(name, f"has {view.checkpoint[name].nbytes} bytes, expected a short text")
    maps = [name for name in (f"{s.partition(_STATE)[0]}.quant_map" for s in states) if view.get(name) is not None]
    small = view.read([*states, *maps])
    for name in states:
        yield _four_bits(view, name, small)
    for prefix in view.ending(".SCB"):
        yield _eight_bits(view, prefix)


def _four_bits(view: View, state_name: str, small: Mapping[str, bytes]) -> QuantizedWeight:
    name, _, kind = state_name.partition(_STATE)
    state = strict_json.load_object(small[state_name], f"{view.where}: {escape(state_name)}")
    shape, size = _shape(view, state_name, state), _number(view, state_name, state, "blocksize")
    stored = view.need(name, name)
    count = math.prod(shape)
    if stored.nbytes != -(-count // 2):
        raise view.misfit(name, f"is {stored.spec}, its state describes {list(shape)}, {-(-count // 2)} bytes")
    parts = {part: f"{name}.{part}" for part in ("absmax", "quant_map")} | {"weight": name, "state": state_name}
    blocks = -(-count // size)
    scales = view.need(parts["absmax"], name)
    if scales.spec.numel != blocks:
        raise view.misfit(parts["absmax"], f"is {scales.spec}, expected {blocks} blocks of {size}")
    if scales.spec.dtype is DType.U8:
        scales = _nested(view, name, state_name, state, scales, parts)
    elif scales.spec.dtype is not DType.F32 or "nested_blocksize" in state:
        kind = "uint8, for its state describes nested scales" if "nested_blocksize" in state else "float32"
        raise view.misfit(parts["absmax"], f"is {scales.spec}, expected {kind}")
    numbers = small.get(parts["quant_map"])
    if numbers is None or len(numbers) != 64 or view.checkpoint[parts["quant_map"]].spec.dtype is not DType.F32:
        raise view.misfit(parts["quant_map"], "is not there or no map of 16 numbers in float32")
    if kind == "fp4" and numbers[32:36] == bytes(4):
        # Code 8 is the sign alone: its kernels give -0, its stored map has 0.
        numbers = numbers[:32] + struct.pack("<f", -0.0) + numbers[36:]
    codes = LazyTensor.make(Codes(4, count, "high"), reshaped(stored, (1, stored.nbytes), DType.U8))
    value = affine(
        # Scales that are quantised too are sums, and small ones come out below zero.
        lambda dtype, steps: Affine(name, dtype, (1, size), ("map",), is_signed="nested_absmax" in parts, steps=steps),
        codes,
        reshaped(scales, (1, blocks)),
        LazyTensor.make(Given(DType.F32, (16,), numbers)),
        shape=shape,
    )
    said = next((dtype for dtype in DTYPES if dtype.value == str(state.get("dtype")).removeprefix("torch.")), None)
    twice = ", scales quantised too" if "nested_absmax" in parts else ""
    scheme = f"{kind}, blocks of {size}{twice}"
    return QuantizedWeight(name, "bitsandbytes", scheme, parts, said or view.model_dtype(), value)


def _nested(
    view: View, name: str, state_name: str, state: Mapping[str, Any], codes: LazyTensor, parts: dict[str, str]
) -> LazyTensor:
    """Scales that are quantised themselves: a map of 256 numbers, a scale for each 256, and an offset."""
    parts |= {part: f"{name}.{part}" for part in ("nested_absmax", "nested_quant_map")}
    scales, numbers = view.need(parts["nested_absmax"], name), view.need(parts["nested_quant_map"], name)
    size = _number(view, state_name, state, "nested_blocksize")
    offset = state.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise view.misfit(state_name, f"has nested_offset {escape(str(offset))}, expected a number")
    count = codes.spec.numel
    if (
        numbers.spec.numel != 256
        or {numbers.spec.dtype, scales.spec.dtype} != {DType.F32}
        or scales.spec.numel != -(-count // size)
    ):
        raise view.misfit(
            parts["nested_absmax"], f"is {scales.spec} with {numbers.spec} for {count} scales, expected float32"
        )
    op = Affine(name, DType.F32, (1, size), ("map",), bias=float(offset))
    grid = reshaped(scales, (1, scales.spec.numel))
    return LazyTensor.make(op, reshaped(codes, (1, count)), grid, reshaped(numbers, (256,)))


def _shape(view: View, where: str, state: Mapping[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(isinstance(n, int) and 0 < n < 1 << 40 for n in shape):
        raise view.misfit(where, f"has shape {escape(str(shape))[:80]}, expected a list of sizes")
    return tuple(shape)


def _number(view: View, where: str, state: Mapping[str, Any], field: str) -> int:
    found = state.get(field)
    if isinstance(found, bool) or not isinstance(found, int) or not 1 < found <= 1 << 16 or found % 2:
        raise view.misfit(where, f"has {field} {escape(str(found))[:80]}, expected an even number")
    return found


def _eight_bits(view: View, prefix: str) -> QuantizedWeight:
    """LLM.int8: rows over their largest magnitude."""
    name = f"{prefix}.weight"
    parts = {"weight": name, "scale": f"{prefix}.SCB"}
    codes, scales = view.need(name, name), view.checkpoint[parts["scale"]]
    if codes.spec.dtype is not DType.I8 or len(codes.spec.shape) != 2 or 0 in codes.spec.shape:
        raise view.misfit(name, f"is {codes.spec}, expected int8 of 2 dimensions")
    rows, columns = codes.spec.shape
    if scales.spec.numel != codes.spec.shape[0] or scales.spec.dtype not in FLOATS:
        raise view.misfit(parts["scale"], f"is {scales.spec}, expected floating-point scales of {rows} rows")
    if view.get(f"{prefix}.weight_format") is not None:
        parts["weight_format"] = f"{prefix}.weight_format"
        if any(view.read([parts["weight_format"]])[parts["weight_format"]]):
            raise view.misfit(parts["weight_format"], "names a layout of a GPU's, expected 0, rows as they are")
    value = affine(
        lambda dtype, steps: Affine(name, dtype, (1, columns), factor=_ONE_127TH, steps=steps),
        codes,
        reshaped(scales, (rows, 1)),
    )
    native = view.dtype_named() or (scales.spec.dtype if scales.spec.dtype in NATIVE else DType.F16)
    return QuantizedWeight(name, "bitsandbytes", "int8, one scale a row", parts, native, value)


_ENDINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
BITSANDBYTES = NumberFormat("bitsandbytes", frozenset({"bitsandbytes"}), find, _ENDINGS)
