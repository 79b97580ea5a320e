"""Weights of 8 bits beside their scales: FP8 of every dialect, and int8.

One scale for all, one a row, or one for each block; DeepSeek's `weight_scale_inv` (which multiplies, despite its name),
`weight_scale` of vLLM, fbgemm, modelopt and compressed-tensors, `scale` of DeepSeek V4, `qscale_weight` of Mistral.
Sources: transformers 5.23 (`integrations/finegrained_fp8.py`), compressed-tensors 0.20, DeepSeek-V3's
`inference/fp8_cast_bf16.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from weightops.formats.quantized.groups import weight_settings
from weightops.formats.quantized.weights import NumberFormat, QuantizedWeight, View, affine
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import Affine, Role, Table
from weightops.ops.numbers.codes import Codes
from weightops.spec import DType

FP8 = (DType.F8_E4M3, DType.F8_E5M2)
_SCALES = ("_scale_inv", "_scale")
"""What is added to the full name of a weight."""
_BESIDE = ("scale", "qscale_weight")
"""What scales are called in the module of a weight."""
_BLOCK = 128
_SMALLEST_BLOCK = 16


def find(view: View) -> Iterator[QuantizedWeight]:
    """The weights of 8 bits that have scales; raises `CorruptInput` for scales that do not fit."""
    for name in list(view):
        codes = view.get(name)
        if codes is None or codes.spec.dtype not in (*FP8, DType.I8) or len(codes.spec.shape) < 2:
            continue
        scale_name = _scale_of(view, name)
        if scale_name is None:
            continue
        parts = {"weight": name, "scale": scale_name}
        zeros = f"{name}_zero_point"
        is_asymmetric = weight_settings(view.settings, name.removesuffix(".weight")).get("symmetric") is False
        if view.get(zeros) is not None or (is_asymmetric and codes.spec.dtype is DType.I8):
            view.need(zeros, name)
            parts["zero_point"] = zeros
        yield scaled_weight(view, name, parts, "scaled", None)


def _scale_of(view: View, name: str) -> str | None:
    """The name of a weight's scales; raises `CorruptInput` for two."""
    module = name.rpartition(".")[0]
    names = [f"{name}{suffix}" for suffix in _SCALES]
    if name.endswith(".weight"):
        names += [f"{module}.{last}" for last in _BESIDE]
    found = [candidate for candidate in names if view.get(candidate) is not None]
    if len(found) > 1:
        raise view.misfit(name, f"has scales under two names, {found[0]} and {found[1]}", "remove what is not its own")
    return found[0] if found else None


def scaled_weight(view: View, name: str, parts: dict[str, str], format: str, native: DType | None) -> QuantizedWeight:
    """The weight whose codes, scales and perhaps zero points are the `parts`; raises `CorruptInput` for what misfits.

    `native` is the type that the format gives it, where that is not told by the scales.
    """
    codes, scales = view.checkpoint[parts["weight"]], view.checkpoint[parts["scale"]]
    zeros = view.checkpoint[parts["zero_point"]] if "zero_point" in parts else None
    if scales.spec.dtype is DType.U8:  # MXFP8: exponents alone
        scales = reshaped(scales, scales.spec.shape, DType.F8_E8M0)
    is_fp4 = codes.spec.dtype is DType.I8 and scales.spec.dtype is DType.F8_E8M0  # DeepSeek V4's experts
    if is_fp4:
        codes = LazyTensor.make(Codes(4, 2 * codes.spec.shape[-1]), codes)
    _check_kind(view, name, parts["weight"], is_fp4)
    if len(codes.spec.shape) < 2 or 0 in codes.spec.shape or 0 in scales.spec.shape:
        raise view.misfit(parts["weight"], f"is {codes.spec} with scales {scales.spec}, expected a matrix with scales")
    if not scales.spec.dtype.is_float:
        raise view.misfit(parts["scale"], f"is {scales.spec}, expected floating-point scales")
    if zeros is not None and zeros.spec.shape != scales.spec.shape:
        raise view.misfit(parts["zero_point"], f"is {zeros.spec}, expected the shape of {scales.spec}")
    shape = codes.spec.shape
    block, grid = _block(view, name, shape, scales.spec.shape)
    if len(grid) < len(shape):  # one scale for all experts
        codes = reshaped(codes, (math.prod(shape[:-1]), shape[-1]))
        block = codes.spec.shape[0], block[1]
    inputs = [reshaped(given, grid) for given in (scales, zeros) if given is not None]
    roles: tuple[Role, ...] = ("zeros",) if zeros is not None else ()
    table: Table = "e2m1" if is_fp4 else ""
    value = affine(
        lambda dtype, steps: Affine(name, dtype, block, roles, table, steps=steps), codes, *inputs, shape=shape
    )
    kind = "fp4" if is_fp4 else "fp8" if codes.spec.dtype in FP8 else "int8"
    return QuantizedWeight(name, format, f"{kind}, {_words(block, shape)}", parts, native or view.native(scales), value)


def _check_kind(view: View, name: str, codes_name: str, is_fp4: bool) -> None:
    """Raise `CorruptInput` where the configuration says integers and codes are floats, or the reverse."""
    codes = view.checkpoint[codes_name]
    said = weight_settings(view.settings, name.removesuffix(".weight")).get("type")
    expected = "float" if view.method in ("fp8", "fbgemm_fp8") else said
    found = "float" if is_fp4 or codes.spec.dtype in FP8 else "int"
    if expected in ("float", "int") and expected != found:
        kind = "8-bit floats" if expected == "float" else "int8"
        raise view.misfit(codes_name, f"is {codes.spec}, expected {kind}, as {view.stated_in} says")


def _words(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    if block[0] >= shape[-2] and block[1] >= shape[-1]:
        return "one scale a tensor"
    if block[0] == 1:
        return "one scale a row" if block[1] >= shape[-1] else f"groups of {block[1]}"
    return f"blocks of {block[0]} x {block[1]}"


def _block(
    view: View, name: str, shape: tuple[int, ...], scales: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The rows and columns that share a scale, and the shape in which scales are a grid of them.

    What the configuration says is taken, and held against the tensors; without it blocks are DeepSeek's where they fit.
    """
    *batch, rows, columns = shape
    named = _named_block(view, name)
    is_grid = len(scales) == len(shape) and list(scales[:-2]) == batch
    if math.prod(scales) == 1 and not (is_grid and named and (named[0] < rows or named[1] < columns)):
        return (rows, columns), (1, 1)
    if tuple(scales) in ((*batch,), (*batch, 1), (*batch, 1, 1)) and batch:
        return (rows, columns), (*batch, 1, 1)
    if scales in ((*batch, rows), (*batch, rows, 1)):
        return (1, columns), (*batch, rows, 1)
    if is_grid:
        grid_rows, grid_columns = scales[-2:]
        guesses = [named] if named else [(_BLOCK, _BLOCK)]
        guess = -(-rows // grid_rows), -(-columns // grid_columns)
        if not named and all(_is_usual(size) for size in guess):
            guesses.append(guess)
        for height, width in guesses:
            if (-(-rows // height), -(-columns // width)) == (grid_rows, grid_columns):
                return (height, width), scales
        if named:
            expected = [-(-rows // named[0]), -(-columns // named[1])]
            raise view.misfit(
                name,
                f"has scales {list(scales)} for {list(shape)}, blocks of {named[0]} x {named[1]} as "
                f"{view.stated_in} says make {expected}",
            )
    raise view.misfit(name, f"has scales {list(scales)} for {list(shape)}, which are no blocks of one size")


def _is_usual(size: int) -> bool:
    """Whether blocks have such sides: one row, or a power of two; others come of tensors that do not fit."""
    return size == 1 or (size >= _SMALLEST_BLOCK and size & (size - 1) == 0)


def _named_block(view: View, name: str) -> tuple[int, int] | None:
    """The block that the configuration names for a weight."""
    weights: Mapping[str, Any] = weight_settings(view.settings, name.removesuffix(".weight"))
    size = weights.get("group_size")
    found = view.settings.get("weight_block_size") or weights.get("block_structure")
    if isinstance(found, list) and len(found) == 2 and all(isinstance(n, int) and 0 < n < 1 << 40 for n in found):
        return found[0], found[1]
    return (1, size) if isinstance(size, int) and size > 0 and weights.get("strategy") == "group" else None


SCALED = NumberFormat("scaled", frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark"}), find)
