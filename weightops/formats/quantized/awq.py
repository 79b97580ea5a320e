"""AWQ: integers of 4 bits with zero points as they are, in the layouts gemm, gemv and gemv_fast of autoawq.

For a module of k inputs and n outputs: gemm has `qweight` int32 `[k, n / 8]`, `qzeros` `[k / g, n / 8]` and `scales`
`[k / g, n]`, with eight outputs in a word in the order of `ops.numbers.codes.AWQ`; gemv `qweight` `[n, k / 8]`,
`qzeros` `[n, w]` and `scales` `[n, 8 w]` in their own order, w padded; gemv_fast int16 `[n / 4, k]` with `scales` and
`qzeros` float16 `[8 w, n]`. Source: autoawq 0.2.9 (`modules/linear/*.py`, `utils/packing_utils.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from weightops.formats.quantized.weights import AUTO_ROUND, Integers, NumberFormat, QuantizedWeight, View, affine
from weightops.lazy import LazyTensor
from weightops.ops.arrange import cut
from weightops.ops.numbers.affine import Affine
from weightops.ops.numbers.codes import AWQ, Codes, FastCodes, RowCodes, held
from weightops.ops.transpose import transposed
from weightops.spec import DType

_BITS = 4
_PER_WORD = 8


def is_awq(view: View, prefix: str) -> bool:
    """Whether the packed tensors of a module are AWQ's, by their shapes."""
    qweight, qzeros, scales = (view.get(f"{prefix}.{part}") for part in ("qweight", "qzeros", "scales"))
    if qweight is None or qzeros is None or scales is None:
        return False
    shapes = [t.spec.shape for t in (qweight, qzeros, scales)]
    if any(len(shape) != 2 for shape in shapes):
        return False
    (height, width), (zero_rows, zero_width), (groups, outputs) = shapes
    if qweight.spec.dtype is DType.I16:
        return True
    is_gemm = width * _PER_WORD == outputs and zero_width == width and zero_rows == groups
    is_gemv = height == zero_rows == groups and zero_width * _PER_WORD == outputs
    asked = view.method == "awq" or "awq" in str(view.settings.get("packing_format"))
    # A GPTQ module of 4 bits has these shapes only where it is as wide as a word is long.
    is_gptq = qweight.spec.shape[1] == outputs
    return (is_gemm or is_gemv) and (asked or not is_gptq)


def find(view: View) -> Iterator[QuantizedWeight]:
    """The modules that are packed as AWQ packs them; raises `CorruptInput` for tensors that do not fit each other."""
    for prefix in view.ending(".qweight"):
        if is_awq(view, prefix):
            yield _module(view, prefix)


def _module(view: View, prefix: str) -> QuantizedWeight:
    name = f"{prefix}.weight"
    parts = {part: f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales")}
    qweight, qzeros, scales = (view.checkpoint[name] for name in parts.values())
    native = view.native(scales)
    if qweight.spec.dtype is DType.I16:
        return _fast(view, prefix, parts)
    height, width = qweight.spec.shape
    if scales.spec.shape[1] == width * _PER_WORD and qzeros.spec.shape[1] == width:
        columns, size = height, _size(view, name, height, scales.spec.shape[0])
        words = held(transposed(qweight))
        codes = LazyTensor.make(RowCodes(_BITS, AWQ), words)
        factors = held(transposed(scales))
        zeros = held(LazyTensor.make(RowCodes(_BITS, AWQ), transposed(qzeros)))
        kind = "gemm"
    else:
        columns, kind = width * _PER_WORD, "gemv"
        said = view.settings.get("group_size") or view.settings.get("q_group_size")
        size = columns if said == -1 else said if isinstance(said, int) and said > 0 else 128
        count = -(-columns // size)
        if scales.spec.shape[1] < count or scales.spec.shape[0] != height:
            raise view.misfit(name, f"has scales {scales.spec}, expected {count} groups of {size} for each of {height}")
        codes = LazyTensor.make(Codes(_BITS, columns), qweight)
        factors = cut(scales, 1, 0, count)
        zeros = LazyTensor.make(Codes(_BITS, count), qzeros)
    value = affine(
        lambda dtype, steps: Affine(name, dtype, (1, size), ("zeros",), is_signed=True, steps=steps),
        codes,
        factors,
        zeros,
    )
    integers = Integers(codes, factors, zeros, _BITS, size)
    return QuantizedWeight(name, "awq", f"awq {kind}, 4 bits, groups of {size}", parts, native, value, integers)


def _fast(view: View, prefix: str, parts: dict[str, str]) -> QuantizedWeight:
    """gemv_fast: what is added to the product is stored, rounded to float16, in the place of the zero points."""
    name = f"{prefix}.weight"
    qweight, qzeros, scales = (view.checkpoint[part] for part in parts.values())
    outputs, columns = 4 * qweight.spec.shape[0], qweight.spec.shape[1]
    said = view.settings.get("group_size") or view.settings.get("q_group_size")
    size = columns if said == -1 else said if isinstance(said, int) and said > 0 else 128
    count = -(-columns // size)
    if scales.spec != qzeros.spec or scales.spec.shape[1] != outputs or scales.spec.shape[0] < count:
        raise view.misfit(name, f"has scales {scales.spec} and {qzeros.spec}, expected {count} groups for {outputs}")
    factors, biases = (held(transposed(cut(tensor, 0, 0, count))) for tensor in (scales, qzeros))
    codes = LazyTensor.make(FastCodes(), qweight)
    value = affine(
        lambda dtype, steps: Affine(name, dtype, (1, size), ("biases",), is_signed=True, steps=steps),
        codes,
        factors,
        biases,
    )
    scheme = f"awq gemv_fast, 4 bits, groups of {size}"
    return QuantizedWeight(name, "awq", scheme, parts, view.native(scales), value)


def _size(view: View, name: str, columns: int, groups: int) -> int:
    """Inputs in a group."""
    if columns % groups:
        raise view.misfit(name, f"has {groups} groups for {columns} inputs")
    return columns // groups


AWQ_FORMAT = NumberFormat("awq", frozenset({"awq"}) | AUTO_ROUND, find)
