"""AWQ: integers of 4 bits with zero points as they are, in the layouts gemm, gemv and gemv_fast of autoawq.

For a module of k inputs and n outputs: gemm has `qweight` int32 `[k, n / 8]`, `qzeros` `[k / g, n / 8]` and `scales`
`[k / g, n]`, with eight outputs in a word in the order of `ops.numbers.codes.AWQ`; gemv `qweight` `[n, k / 8]`,
`qzeros` `[n, w]` and `scales` `[n, 8 w]` in their own order, w padded; gemv_fast int16 `[n / 4, k]` with `scales` and
`qzeros` float16 `[8 w, n]`. Source: autoawq 0.2.9 (`modules/linear/*.py`, `utils/packing_utils.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from weightops.formats.quantized.weights import (
    AUTO_ROUND,
    FLOATS,
    Integers,
    NumberFormat,
    QuantizedWeight,
    View,
    affine,
)
from weightops.lazy import LazyTensor
from weightops.ops.arrange import cut
from weightops.ops.numbers.affine import Affine, Role
from weightops.ops.numbers.codes import AWQ, Codes, FastCodes, RowCodes, held
from weightops.ops.transpose import transposed
from weightops.spec import DType

Layout = Literal["gemm", "gemv", "gemv_fast"]
_BITS = 4
_PER_WORD = 8
_PARTS = ("qweight", "qzeros", "scales")


def find(view: View) -> Iterator[QuantizedWeight]:
    """The modules that are packed as AWQ packs them; raises `CorruptInput` for tensors that do not fit each other."""
    for prefix in view.ending(".qweight"):
        layout = _layout(view, prefix)
        if layout is not None:
            yield _module(view, prefix, layout)


def _layout(view: View, prefix: str) -> Layout | None:
    """How a module is packed by the shapes of its tensors; None where it is GPTQ's."""
    name = f"{prefix}.weight"
    is_asked = view.method == "awq" or "awq" in str(view.settings.get("packing_format"))
    found = [view.get(f"{prefix}.{part}") for part in _PARTS]
    if not is_asked and any(t is None or len(t.spec.shape) != 2 for t in found):
        return None
    qweight, qzeros, scales = (view.need(f"{prefix}.{part}", name) for part in _PARTS)
    if qweight.spec.dtype is DType.I16:
        return "gemv_fast"
    if is_asked:
        for part, dtypes in zip(_PARTS, ([DType.I32], [DType.I32], FLOATS), strict=True):
            view.part(f"{prefix}.{part}", name, dtypes, 2)
    (height, width), (zero_rows, zero_width), (groups, outputs) = (t.spec.shape for t in (qweight, qzeros, scales))
    # A GPTQ module of 4 bits has these shapes only where it is as wide as a word is long.
    if is_asked or width != outputs:
        if width * _PER_WORD == outputs and zero_width == width and zero_rows == groups < height:
            return "gemm"
        if height == zero_rows == groups and zero_width * _PER_WORD == outputs:
            return "gemv"
    if not is_asked or width == outputs:
        return None
    raise view.misfit(
        f"{prefix}.qweight",
        f"is {qweight.spec} with qzeros {qzeros.spec} and scales {scales.spec}, expected [k, n / 8] with "
        "[k / g, n / 8] and [k / g, n], or [n, k / 8] with [n, w] and [n, 8 w]",
    )


def _module(view: View, prefix: str, layout: Layout) -> QuantizedWeight:
    name = f"{prefix}.weight"
    parts = {part: f"{prefix}.{part}" for part in _PARTS}
    qweight, qzeros, scales = (view.checkpoint[name] for name in parts.values())
    height, width = qweight.spec.shape
    role: Role = "zeros"
    match layout:
        case "gemm":
            size = _size(view, parts["scales"], height, scales.spec.shape[0])
            codes = LazyTensor.make(RowCodes(_BITS, AWQ), held(transposed(qweight)))
            factors = held(transposed(scales))
            zeros = held(LazyTensor.make(RowCodes(_BITS, AWQ), transposed(qzeros)))
        case "gemv":
            columns = width * _PER_WORD
            size = _padded_size(view, parts["scales"], columns, scales.spec.shape[1])
            count = columns // size
            codes = LazyTensor.make(Codes(_BITS, columns), qweight)
            factors = cut(scales, 1, 0, count)
            zeros = LazyTensor.make(Codes(_BITS, count), qzeros)
        case "gemv_fast":
            # What is added to the product is stored, rounded to float16, in the place of the zero points.
            if (
                width % 64
                or len(scales.spec.shape) != 2
                or scales.spec != qzeros.spec
                or scales.spec.shape[1] != 4 * height
            ):
                raise view.misfit(
                    parts["qweight"],
                    f"is {qweight.spec} with scales {scales.spec} and {qzeros.spec}, expected "
                    "[n / 4, k] in blocks of 64 columns, and twice [8 w, n]",
                )
            role = "biases"
            size = _padded_size(view, parts["scales"], width, scales.spec.shape[0])
            factors, zeros = (held(transposed(cut(tensor, 0, 0, width // size))) for tensor in (scales, qzeros))
            codes = LazyTensor.make(FastCodes(), qweight)
    value = affine(
        lambda dtype, steps: Affine(name, dtype, (1, size), (role,), is_signed=True, steps=steps),
        codes,
        factors,
        zeros,
    )
    scheme = f"awq {layout}, 4 bits, groups of {size}"
    integers = Integers(codes, factors, zeros, _BITS, size) if role == "zeros" else None
    return QuantizedWeight(name, "awq", scheme, parts, view.native(scales), value, integers)


def _said(view: View, columns: int) -> int | None:
    """The group size that the configuration names, where it is one."""
    said = view.settings.get("group_size") or view.settings.get("q_group_size")
    if isinstance(said, bool) or not isinstance(said, int):
        return None
    return columns if said == -1 else said if said > 0 else None


def _size(view: View, name: str, columns: int, groups: int) -> int:
    """Inputs in a group, which are as many in each."""
    size, rest = divmod(columns, groups)
    said = _said(view, columns)
    if rest or said not in (None, size):
        stated = f"{view.stated_in} says group_size {said}" if said is not None else "which do not share them evenly"
        raise view.misfit(name, f"has {groups} groups for {columns} inputs, {stated}")
    return size


def _padded_size(view: View, name: str, columns: int, width: int) -> int:
    """Inputs in a group by how wide their scales are, padded as autoawq's `calculate_zeros_width` says."""
    said = _said(view, columns)
    fitting = [
        s for s in dict.fromkeys((128, 64, 32, columns)) if columns % s == 0 and _padded(columns // s, s) == width
    ]
    if said in fitting or (said is None and len(fitting) == 1):
        return said or fitting[0]
    stated = f"{view.stated_in} says group_size {said}" if said is not None else "and nothing says group_size"
    raise view.misfit(name, f"has room for {width} groups of {columns} inputs, {stated}")


def _padded(groups: int, size: int) -> int:
    """The scales that are stored for so many groups."""
    words = {64: 2, 32: 4}.get(size, 1)
    return _PER_WORD * words * -(-groups // (_PER_WORD * words))


AWQ_FORMAT = NumberFormat("awq", frozenset({"awq"}) | AUTO_ROUND, find, tuple(f".{part}" for part in _PARTS))
