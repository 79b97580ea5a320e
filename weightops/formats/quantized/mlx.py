"""MLX: rows of codes in words of 32 bits, with scales and biases, or in the MX types with scales alone.

For a module P: `P.weight` uint32 `[n, k * bits / 32]`, `P.scales` and `P.biases` `[n, k / group_size]`; bits and group
size of a module follow from the shapes and the configuration. Source: mlx 0.32 (`mx.quantize`, `mx.dequantize` on the
CPU).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weightops.formats.quantized.weights import FLOATS, NATIVE, NumberFormat, QuantizedWeight, View, affine
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import Affine, Table
from weightops.ops.numbers.codes import Codes
from weightops.spec import DType

_BITS = (2, 3, 4, 5, 6, 8)
_SIZES = (64, 32, 128, 16)
_MODES: Mapping[str, tuple[int, int, Table]] = {
    "mxfp4": (4, 32, "e2m1"),
    "mxfp8": (8, 32, "e4m3"),
    "nvfp4": (4, 16, "e2m1"),
}
"""Bits, columns that share a scale, and what codes are."""


def find(view: View) -> Iterator[QuantizedWeight]:
    """The quantised modules, embeddings and heads among them, and stacks of experts."""
    for prefix in view.ending(".scales"):
        name = f"{prefix}.weight"
        biases = view.get(f"{prefix}.biases")
        if view.method != "mlx" and (biases is None or view.get(name) is None):
            continue  # of GPTQ, or of a plain model
        packed = view.part(name, name, [DType.U32])
        scales = view.part(f"{prefix}.scales", name, [DType.U8] if biases is None else FLOATS)
        if scales.spec.shape[:-1] != packed.spec.shape[:-1] or (biases is not None and biases.spec != scales.spec):
            raise view.misfit(name, f"is {packed.spec} with scales {scales.spec}, which do not fit each other")
        said = view.settings.get(prefix)
        settings = {**view.settings, **(said if isinstance(said, Mapping) else {})}
        if biases is not None:
            yield _affine(view, prefix, packed, scales, biases, settings)
        else:
            yield _small_floats(view, prefix, packed, scales, settings)


def _affine(
    view: View, prefix: str, packed: LazyTensor, scales: LazyTensor, biases: LazyTensor, settings: Mapping[str, Any]
) -> QuantizedWeight:
    name = f"{prefix}.weight"
    bits, size = _sizes(view, name, packed, scales, settings)
    columns = scales.spec.shape[-1] * size
    native = scales.spec.dtype
    codes = LazyTensor.make(Codes(bits, columns), packed)
    value = affine(
        # The product is rounded in the type of the scales; in a wider type nothing is rounded on the way.
        lambda dtype, steps: Affine(
            name,
            dtype,
            (1, size),
            ("biases",),
            rounded=native if dtype is native and native in NATIVE else None,
            is_signed=True,
            steps=steps,
        ),
        codes,
        scales,
        biases,
    )
    parts = {"weight": name, "scales": f"{prefix}.scales", "biases": f"{prefix}.biases"}
    return QuantizedWeight(name, "mlx", f"mlx, {bits} bits, groups of {size}", parts, native, value)


def _sizes(
    view: View, name: str, packed: LazyTensor, scales: LazyTensor, settings: Mapping[str, Any]
) -> tuple[int, int]:
    """Bits and group size: those that the configuration says, where they fit the shapes."""
    words, groups = packed.spec.shape[-1], scales.spec.shape[-1]
    said = settings.get("bits"), settings.get("group_size")
    fitting = [(bits, size) for bits in _BITS for size in _SIZES if groups * size * bits == words * 32]
    if said in fitting:
        return next(pair for pair in fitting if pair == said)
    if view.settings and said != (None, None):
        raise view.misfit(
            name,
            f"has {words} words and {groups} groups a row, {view.stated_in} says bits {said[0]}, group_size {said[1]}",
            "the configuration is of another model, or the files are damaged",
        )
    if len(fitting) != 1:
        raise view.misfit(
            name, "could have several numbers of bits, and no configuration says which", "add config.json"
        )
    return fitting[0]


def _small_floats(
    view: View, prefix: str, packed: LazyTensor, scales: LazyTensor, settings: Mapping[str, Any]
) -> QuantizedWeight:
    name, mode = f"{prefix}.weight", str(settings.get("mode") or "")
    if mode not in _MODES:
        raise view.misfit(
            name, f"has no biases, expected them, or one of the modes {', '.join(_MODES)} in {view.stated_in}"
        )
    bits, size, table = _MODES[mode]
    columns = scales.spec.shape[-1] * size
    if packed.spec.shape[-1] * 32 != columns * bits:
        raise view.misfit(name, f"is {packed.spec} with scales {scales.spec}, {mode} has groups of {size}")
    kind = DType.F8_E4M3 if mode == "nvfp4" else DType.F8_E8M0
    codes = LazyTensor.make(Codes(bits, columns), packed)
    factors = reshaped(scales, scales.spec.shape, kind)
    value = affine(lambda dtype, steps: Affine(name, dtype, (1, size), table=table, steps=steps), codes, factors)
    parts = {"weight": name, "scales": f"{prefix}.scales"}
    return QuantizedWeight(name, "mlx", f"mlx {mode}, groups of {size}", parts, view.model_dtype(), value)


MLX = NumberFormat("mlx", frozenset({"mlx"}), find, (".scales", ".biases"))
