"""torchao: int8, float8 and unpacked intx as its safetensors support flattens them.

For a weight `P.weight`: `P._weight_qdata`, `P._weight_scale`, `P._weight_zero_point`; what each is stands in the file's
metadata. Source: torchao 0.18 (`prototype/safetensors`, `quantize_/workflows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.quantized.scaled import FP8, scaled_weight
from weightops.formats.quantized.weights import NumberFormat, QuantizedWeight, View
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.ops.numbers.affine import DTYPES
from weightops.spec import DType

_TYPES = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")


def find(view: View) -> Iterator[QuantizedWeight]:
    """The quantised weights; raises `IncompatibleInputs` for the types that are laid out for a GPU."""
    for prefix in view.ending("_weight_qdata"):
        name, data = f"{prefix}weight", f"{prefix}_weight_qdata"
        about = _about(view, name)
        kind = about.get("_type")
        codes = view.checkpoint[data]
        if (kind is not None and kind not in _TYPES) or codes.spec.dtype not in (*FP8, DType.I8):
            raise IncompatibleInputs(
                f"{view.where}: {escape(name)} is {escape(str(kind or codes.spec))} of torchao, which is not read, "
                f"expected one of {', '.join(_TYPES)}",
                hint="dequantise it with torchao",
            )
        if kind is not None and (codes.spec.dtype is DType.I8) == kind.startswith("Float8"):
            raise view.misfit(data, f"is {codes.spec}, expected the codes of {kind}")
        parts = {"weight": data, "scale": f"{prefix}_weight_scale"}
        listed = about.get("_tensor_data_names")
        zeros = f"{prefix}_weight_zero_point"
        if view.get(zeros) is not None or (isinstance(listed, list) and "zero_point" in listed):
            parts["zero_point"] = zeros
        for part in parts.values():
            view.need(part, name)
        inner = about.get("_data")
        said = inner.get("dtype") if isinstance(inner, Mapping) else None
        named = str(said.get("_data") if isinstance(said, Mapping) else said)
        native = next((dtype for dtype in DTYPES if dtype.value == named), None)
        yield scaled_weight(view, name, parts, "torchao", native)


def _about(view: View, name: str) -> Mapping[str, Any]:
    """What the metadata of the file says of a tensor."""
    text = view.checkpoint.metadata.get(name)
    if not isinstance(text, str):
        return {}
    try:
        return strict_json.load_object(text.encode(), f"{view.where}: {escape(name)} in __metadata__")
    except CorruptInput:
        return {}


_ENDINGS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
TORCHAO = NumberFormat("torchao", frozenset({"torchao"}), find, _ENDINGS)
