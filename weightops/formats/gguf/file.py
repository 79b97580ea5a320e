"""Specs and metadata to a GGUF file, version 3 and little-endian: the bytes that `GGUFWriter` of gguf writes.

Metadata has its types, see `weightops.formats.gguf.metadata`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from weightops.errors import UsageError
from weightops.formats.gguf.reading import (
    ALIGNMENT_KEY,
    MAGIC,
    MAX_NAME_NBYTES,
    MAX_RANK,
    alignment_of,
    is_blocks,
    is_name,
)
from weightops.formats.gguf.types import ARRAY, CODES, NUMBERS, SCALARS
from weightops.formats.layout import Data, Layout, Literal
from weightops.io.escape import escape
from weightops.spec import TensorSpec


def gguf_layout(tensors: Sequence[tuple[str, TensorSpec]], metadata: Mapping[str, Any]) -> Layout:
    """The file `GGUFWriter` writes for these tensors and this metadata, both in their order, the architecture first.

    Raises `UsageError` for names of more than 63 bytes, more than 4 dimensions, dtypes that ggml does not have, and
    values that their types cannot hold.
    """
    alignment = alignment_of(metadata)
    if alignment is None:
        raise UsageError(f"{ALIGNMENT_KEY} must be a power of two, as uint32")
    infos, pieces, offset = bytearray(), list[Data | Literal](), 0
    for name, spec in tensors:
        infos += _info(name, spec, offset)
        pieces.append(Data(name, spec.nbytes))
        if padding := -spec.nbytes % alignment:
            pieces.append(Literal(bytes(padding)))
        offset += spec.nbytes + padding
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key in sorted(metadata, key=lambda key: key != "general.architecture"):
        head += _pair(key, metadata[key])
    head += infos
    head += bytes(-len(head) % alignment)
    return Layout((Literal(bytes(head)), *pieces), {})


def _info(name: str, spec: TensorSpec, offset: int) -> bytes:
    """What the header says of a tensor; ggml counts dimensions from the last."""
    where, code = escape(name), CODES.get(spec.dtype)
    if code is None:
        types = " ".join(dtype.name for dtype in CODES)
        raise UsageError(f"{where}: GGUF has no {spec.dtype.value}", hint=f"it has {types}")
    if not is_name(name.encode()):
        raise UsageError(f"{where}: the name of a tensor in a GGUF file has at most {MAX_NAME_NBYTES} bytes")
    if len(spec.shape) > MAX_RANK or not is_blocks(spec):
        raise UsageError(f"{where}: a GGUF file cannot hold {spec}")
    return _string(name) + struct.pack(f"<I{len(spec.shape)}QIQ", len(spec.shape), *reversed(spec.shape), code, offset)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pair(key: str, value: Mapping[str, Any]) -> bytes:
    """A key of metadata and its value."""
    try:
        ((kind, content),) = value.items()
        if kind == "array":
            inner, items = content
            return _string(key) + struct.pack("<IIQ", ARRAY, NUMBERS[inner], len(items)) + _packed(inner, items)
        return _string(key) + struct.pack("<I", NUMBERS[kind]) + _packed(kind, [content])
    except (struct.error, OverflowError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{escape(key)}: GGUF cannot hold {escape(repr(value)[:80])} ({escape(str(error))})") from None


def _packed(kind: str, items: Sequence[Any]) -> bytes:
    if kind == "string":
        return b"".join(map(_string, items))
    return struct.pack(f"<{len(items)}{SCALARS[kind][1]}", *items)
