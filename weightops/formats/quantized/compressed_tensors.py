"""compressed-tensors: integers in words, NVFP4 and the MX types in bytes, and what its older versions wrote.

For a module P with weight `[n, k]`: `P.weight_packed`, `P.weight_scale` and, by kind, `P.weight_shape`,
`P.weight_zero_point`, `P.weight_g_idx`, `P.weight_global_scale`. Its int-, float- and naive-quantized formats hold a
weight of 8 bits beside its scales, which `scaled` reads. Sources: compressed-tensors 0.20 and, for padded words, g_idx
and bitmasks, 0.12 and 0.17.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from weightops.errors import IncompatibleInputs
from weightops.formats.quantized.groups import format_of, weight_settings
from weightops.formats.quantized.weights import (
    FLOATS,
    Integers,
    NumberFormat,
    QuantizedWeight,
    View,
    affine,
)
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import Affine, Role, ScalesOverOne, Table
from weightops.ops.numbers.codes import Codes, Order, held
from weightops.ops.numbers.sparse import Bitmask, Masked24
from weightops.ops.transpose import transposed
from weightops.spec import DType, TensorSpec

_INTEGERS = (DType.I64, DType.I32)
_FP4: Table = "e2m1"
_FP6: Table = "e2m3"
_NEWEST = (99,)
_FUSED = ("weight_input", "weight_output")
"""Where a transform lies whose rotation is part of the stored weight and of its neighbours."""


def find(view: View) -> Iterator[QuantizedWeight]:
    """Packed weights, and those that a bitmask thinned out; raises as the other formats do."""
    prefixes = view.ending(".weight_packed")
    if prefixes or view.method == "compressed-tensors":
        _refuse_rotated(view)
    shapes = view.read(f"{p}.weight_shape" for p in prefixes if view.get(f"{p}.weight_shape") is not None)
    for prefix in prefixes:
        if view.get(f"{prefix}.meta") is not None:
            raise IncompatibleInputs(
                f"{view.where}: {escape(prefix)} is packed for the marlin-24 kernel, which is not read",
                hint="its own library cannot unpack it either: take the checkpoint that it was made of",
            )
        packed = view.checkpoint[f"{prefix}.weight_packed"]
        if packed.spec.dtype is DType.U8:
            yield _small_floats(view, prefix, packed)
        else:
            yield _integers(view, prefix, packed, shapes.get(f"{prefix}.weight_shape"))
    yield from _sparse(view)


def _refuse_rotated(view: View) -> None:
    """Refuse rotations that are applied while the model runs: the stored weights alone are another model's."""
    transforms = view.settings.get("transform_config")
    schemes = transforms.get("config_groups") if isinstance(transforms, dict) else None
    for scheme in schemes.values() if isinstance(schemes, dict) else ():
        for place in (scheme.get("apply") or ()) if isinstance(scheme, dict) else ():
            location = place.get("location") if isinstance(place, dict) else None
            if location not in _FUSED:
                raise IncompatibleInputs(
                    f"{view.where}: {view.stated_in} names a transform at {escape(str(location))}, which is applied "
                    "while the model runs: plain weights cannot hold it",
                    hint="use the checkpoint that was there before the rotation",
                )


def _shape(view: View, prefix: str, data: bytes | None, packed: LazyTensor) -> tuple[int, int]:
    """The shape of the weight, by weight_shape, which is there since 2023."""
    import numpy as np

    spec = packed.spec
    shape_name = f"{prefix}.weight_shape"
    about = view.need(shape_name, f"{prefix}.weight").spec
    if data is None or about.dtype not in _INTEGERS or about.shape != (2,) or len(spec.shape) != 2:
        raise view.misfit(shape_name, f"is {about} for {spec}, expected two integers for a matrix")
    rows, columns = (int(n) for n in np.frombuffer(data, about.dtype.value))
    if rows != spec.shape[0] or not 0 < columns < 1 << 40:
        raise view.misfit(
            f"{prefix}.weight_shape", f"is [{rows}, {columns}], the packed weight has {spec.shape[0]} rows"
        )
    return rows, columns


def _integers(view: View, prefix: str, packed: LazyTensor, shape: bytes | None) -> QuantizedWeight:
    """pack-quantized: signed integers of 2 to 8 bits, stored with half their range added."""
    name = f"{prefix}.weight"
    if packed.spec.dtype is not DType.I32:
        raise view.misfit(f"{prefix}.weight_packed", f"is {packed.spec}, expected int32 or uint8")
    rows, columns = _shape(view, prefix, shape, packed)
    scales = view.part(f"{name}_scale", name, FLOATS, 2)
    settings = weight_settings(view.settings, prefix)
    bits, order = _bits(view, prefix, settings.get("num_bits"), columns, packed.spec.shape[1])
    parts = {"packed": f"{name}_packed", "scale": f"{name}_scale", "shape": f"{name}_shape"}
    inputs, roles = [LazyTensor.make(Codes(bits, columns, order), packed)], list[Role]()
    if scales.spec.shape[0] not in (1, rows):
        raise view.misfit(f"{name}_scale", f"is {scales.spec}, expected scales of {rows} rows")
    if scales.spec.numel == 1:
        scales = reshaped(scales, (1, 1))
    count = scales.spec.shape[1]
    inputs.append(scales)
    zero_name, index_name = f"{name}_zero_point", f"{name}_g_idx"
    zeros, g_idx = view.get(zero_name), view.get(index_name)
    if settings.get("symmetric") is False:
        zeros = view.need(zero_name, name)
    if settings.get("actorder") in ("group", True):
        g_idx = view.need(index_name, name)
    if zeros is not None:
        roles.append("zeros")
        parts["zero_point"] = zero_name
        inputs.append(_zeros(view, zero_name, zeros, bits, scales.spec.shape, order))
    size = _group_size(view, prefix, settings.get("group_size"), columns, count)
    if g_idx is not None:
        parts["g_idx"] = index_name
        if g_idx.spec.shape != (columns,) or g_idx.spec.dtype is not DType.I32:
            raise view.misfit(index_name, f"is {g_idx.spec}, expected int32 [{columns}]")
        roles.append("g_idx")
        inputs.append(g_idx)
    named = dict(zip(roles, inputs[2:], strict=True))
    block = (rows if scales.spec.shape[0] == 1 and rows > 1 else 1, size)
    value = affine(
        lambda dtype, steps: Affine(
            name, dtype, block, tuple(roles), offset=0 if zeros is not None else 1 << bits - 1, steps=steps
        ),
        *inputs,
    )
    scheme = f"int{bits}, {'one scale a row' if size >= columns else f'groups of {size}'}"
    # One scale for several rows is no grid that another container has.
    integers = (
        Integers(inputs[0], scales, named.get("zeros"), bits, size, named.get("g_idx")) if block[0] == 1 else None
    )
    return QuantizedWeight(name, "compressed-tensors", scheme, parts, view.native(scales), value, integers)


def _bits(view: View, prefix: str, said: Any, columns: int, words: int) -> tuple[int, Order]:
    """The bits of a code and how words hold them, by the configuration and the width of rows.

    Until 0.17 each word held whole codes, and since 0.18 rows are one stream, which differs for 3, 5, 6 and 7 bits: the
    version decides, and the width where it is not said.
    """
    candidates = [said] if isinstance(said, int) and 2 <= said <= 8 else [4, 8, 2, 3, 5, 6, 7]
    version = _version(view)
    for bits in candidates:
        dense, padded = -(-columns * bits // 32), -(-columns // (32 // bits))
        if 32 % bits == 0 and words == dense:
            return bits, "low"
        orders: list[Order] = ["padded", "low"] if version < (0, 18) else ["low", "padded"]
        # What was built between releases may pack in either way.
        fitting = orders if (0, 17) <= version <= (0, 18) or version == _NEWEST else orders[:1]
        found = next((order for order in fitting if words == (dense if order == "low" else padded)), None)
        if found is not None:
            return bits, found
    stated = f"{view.stated_in} says num_bits {said}" if said is not None else "no configuration names its bits"
    raise view.misfit(
        f"{prefix}.weight_packed",
        f"has rows of {words} words for {columns} columns, and {stated}",
        "the configuration is of another model, or the files are damaged",
    )


def _version(view: View) -> tuple[int, ...]:
    """The version of compressed-tensors that wrote the checkpoint; the newest where it is not said."""
    said = str(view.settings.get("version") or "")
    found = tuple(int(part) for part in said.split(".")[:2] if part.isdigit())
    return found or _NEWEST


def _zeros(view: View, name: str, zeros: LazyTensor, bits: int, grid: tuple[int, ...], order: Order) -> LazyTensor:
    """Zero points in the shape of the scales, as codes: packed along rows, or stored as signed bytes."""
    rows, count = grid
    if zeros.spec.dtype is DType.I8 and zeros.spec.shape == grid:
        raise view.misfit(name, "is not packed beside a packed weight")
    needed = -(-rows // (32 // bits)) if order == "padded" else -(-rows * bits // 32)
    if zeros.spec != TensorSpec(DType.I32, (needed, count)):
        raise view.misfit(name, f"is {zeros.spec}, expected int32 [{needed}, {count}]")
    codes = LazyTensor.make(Codes(bits, rows, order), transposed(zeros))
    return held(transposed(codes))


def _group_size(view: View, prefix: str, said: Any, columns: int, count: int) -> int:
    """Columns in a group: what the configuration says where it fits, or else as many as share evenly."""
    if count == 1:
        return columns
    if isinstance(said, int) and said > 0 and -(-columns // said) == count:
        return said
    if columns % count == 0 and said in (None, -1):
        return columns // count
    raise view.misfit(
        f"{prefix}.weight_scale",
        f"has {count} groups for {columns} columns, {view.stated_in} says group_size {said}",
        "the configuration is of another model, or the files are damaged",
    )


def _small_floats(view: View, prefix: str, packed: LazyTensor) -> QuantizedWeight:
    """NVFP4, MXFP4 and MXFP6: floats of 4 or 6 bits in bytes, with a scale for 16 or 32 columns."""
    name = f"{prefix}.weight"
    packed = view.part(f"{name}_packed", name, [DType.U8])
    scales = view.part(f"{name}_scale", name, [DType.F8_E4M3, DType.U8, DType.F8_E8M0])
    parts = {"packed": f"{name}_packed", "scale": f"{name}_scale"}
    if scales.spec.shape[:-1] != packed.spec.shape[:-1]:
        raise view.misfit(f"{name}_scale", f"is {scales.spec} for {packed.spec}, expected as many rows")
    nbytes, count = packed.spec.shape[-1], scales.spec.shape[-1]
    if view.get(f"{name}_shape") is not None:
        parts["shape"] = f"{name}_shape"
    global_name = f"{name}_global_scale"
    table: Table
    if scales.spec.dtype is DType.F8_E4M3:
        one = view.need(global_name, name)
        if one.spec.numel != 1 or one.spec.dtype not in FLOATS:
            raise view.misfit(global_name, f"is {one.spec}, expected one floating-point number")
        parts["global_scale"] = global_name
        columns, size, table, kind = 2 * nbytes, 16, _FP4, "nvfp4"
        scales = LazyTensor.make(ScalesOverOne(name), scales, one)
    else:
        scales = reshaped(scales, scales.spec.shape, DType.F8_E8M0)
        said = format_of(view.settings, prefix)
        is_six = said.startswith("mxfp6") or (not said.startswith("mxfp4") and nbytes == count * 24)
        columns, size = nbytes * 8 // (6 if is_six else 4), 32
        table, kind = (_FP6, "mxfp6") if is_six else (_FP4, "mxfp4")
    if -(-columns // size) != count:
        raise view.misfit(f"{name}_scale", f"has {count} groups for {columns} columns, {kind} has groups of {size}")
    codes = LazyTensor.make(Codes(6 if kind == "mxfp6" else 4, columns), packed)
    value = affine(lambda dtype, steps: Affine(name, dtype, (1, size), table=table, steps=steps), codes, scales)
    native = view.model_dtype()
    return QuantizedWeight(name, "compressed-tensors", f"{kind}, groups of {size}", parts, native, value)


def _sparse(view: View) -> Iterator[QuantizedWeight]:
    """Weights of which zeros, or two of every four, were left out; 16 bits wide, in compressed-tensors up to 0.12."""
    import numpy as np

    names = view.ending(".bitmask")
    shapes = view.read(f"{n}.shape" for n in names if view.get(f"{n}.shape") is not None)
    for stem in names:
        is_24 = view.get(f"{stem}.row_offsets") is None
        name = f"{stem}.weight" if is_24 and not stem.endswith(".weight") else stem
        values = view.need(f"{stem}.compressed", name)
        mask = view.checkpoint[f"{stem}.bitmask"]
        parts = {part: f"{stem}.{part}" for part in ("compressed", "bitmask", "shape")}
        about = view.need(parts["shape"], name).spec
        if about.dtype is not DType.I64 or about.numel != 2:
            raise view.misfit(parts["shape"], f"is {about}, expected two numbers in int64")
        shape = tuple(int(n) for n in np.frombuffer(shapes[parts["shape"]], np.int64))
        if min(shape) < 1 or mask.spec.shape != (shape[0], -(-shape[1] // 8)):
            raise view.misfit(f"{stem}.bitmask", f"is {mask.spec}, for a weight {list(shape)}")
        op: Any
        if is_24:
            op, inputs = Masked24(name, shape), [values, mask]
        else:
            parts["row_offsets"] = f"{stem}.row_offsets"
            op, inputs = Bitmask(name, shape), [values, mask, view.checkpoint[f"{stem}.row_offsets"]]
        plain = LazyTensor.make(op, *inputs)

        def value(dtype: DType, steps: bool, plain: LazyTensor = plain) -> LazyTensor:
            from weightops.ops.elementwise import cast

            return cast(plain, dtype)

        scheme = "half of its values" if is_24 else "its values but zeros"
        yield QuantizedWeight(name, "compressed-tensors", scheme, parts, values.spec.dtype, value)


_ENDINGS = (
    ".weight_packed",
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_global_scale",
    ".compressed",
    ".bitmask",
    ".row_offsets",
    ".shape",
)
COMPRESSED = NumberFormat("compressed-tensors", frozenset({"compressed-tensors"}), find, _ENDINGS)
