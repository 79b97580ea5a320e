"""The types that a user asks for: one number type, or a mix of GGUF's types with what may be said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightops.errors import UsageError
from weightops.formats.gguf.imatrix import read_imatrix
from weightops.io.source_file import SourceFile
from weightops.layouts.ggml_mix import FILE_TYPES, file_type
from weightops.layouts.gguf.quantised import Mix
from weightops.ops.ggml.quantize import NEAREST, QUANTIZERS
from weightops.spec import DType, parse_dtype

_FLOATS = (DType.F32, DType.F16, DType.BF16)
DTYPES = tuple(dtype.value for dtype in _FLOATS) + tuple(
    name.lower() for name, kind in FILE_TYPES.items() if kind.base.is_packed
)
"""The number types that are shown; for GGUF those of llama-quantize, most of which are mixes."""


def parse_types(to: str, dtype: str | None, own: Mapping[str, Any]) -> tuple[DType | None, Mix | None]:
    """The number type `dtype` of all weights in the layout `to`, or the mix of GGUF's types; `own` are options of one.

    `pure`, `requantise`, `imatrix` (the path of a file), `tensor_type` (`REGEX=TYPE` each), `output_tensor_type` and
    `token_embedding_type`. Raises `UsageError` for types that are none or not written, and options without use; as
    `read_imatrix` does for its file.
    """
    given = next((name for name, value in own.items() if value), None)
    option = "allow_requantize" if given == "requantise" else given
    if given is not None and (to != "gguf" or dtype is None):
        hint = f"leave {option} out, or give the type, such as q4_k_m" if to == "gguf" else "it is for gguf alone"
        raise UsageError(f"{option} has no use without a type to quantise to", hint=hint)
    if to != "gguf" and dtype is not None and dtype.lower() in DTYPES[len(_FLOATS) :]:
        raise UsageError(f"{dtype} is a type of GGUF alone", hint="give --to gguf")
    plain = next((d for d in _FLOATS if dtype is not None and dtype.lower() in (d.value, d.name.lower())), None)
    if to == "gguf" and dtype is not None and (plain is None or given is not None):
        return None, _parse_mix(plain.name if plain else dtype, **own)
    return plain or parse_dtype(dtype), None


def _parse_mix(
    name: str,
    *,
    pure: bool,
    imatrix: str | None,
    tensor_type: Sequence[str],
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    requantise: bool,
) -> Mix:
    """A mix as options say it."""
    pairs = [text.partition("=") for text in tensor_type]
    odd = next(
        (text for text, (regex, _, dtype) in zip(tensor_type, pairs, strict=True) if not (regex and dtype)), None
    )
    if odd is not None:
        raise UsageError(f"tensor_type is {odd!r}, expected REGEX=TYPE", hint="for example ffn_down=q6_k")
    return Mix(
        name=file_type(name),
        pure=pure,
        overrides=tuple((regex, _type(dtype)) for regex, _, dtype in pairs),
        output=_type(output_tensor_type) if output_tensor_type else None,
        embedding=_type(token_embedding_type) if token_embedding_type else None,
        importance=read_imatrix(SourceFile.at(Path(imatrix))) if imatrix else None,
        requantise=requantise,
    )


def _type(name: str) -> DType:
    """A type of a tensor by ggml's name, in any case."""
    found = next((dtype for dtype in (*_FLOATS, *QUANTIZERS, *NEAREST) if name.upper() == dtype.name), None)
    if found is None:
        known = ", ".join(dtype.name.lower() for dtype in (*_FLOATS, *QUANTIZERS))
        raise UsageError(f"there is no type {name!r} of tensors", hint=f"choose one of {known}")
    return found
