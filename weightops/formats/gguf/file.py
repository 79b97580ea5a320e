"""GGUF files, version 3 and little-endian: header to lazy tensors and metadata, and specs to a file layout.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The layout is byte-identical to what `GGUFWriter`
of the gguf package writes; the reader refuses what llama.cpp's `gguf_init_from_file` refuses.

Metadata is JSON data here, each value with its type: `{"llama.block_count": {"uint32": 32}}`, and an array as
`{"tokenizer.ggml.scores": {"array": ["float32", [0.0, -1.5]]}}`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.formats.layout import Data, Layout, Literal
from weightops.formats.safetensors import MAX_HEADER_NBYTES, MAX_TENSORS
from weightops.formats.sniff import explain
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.stored import Stored
from weightops.spec import DType, TensorSpec
from weightops.stores.reader import FileReader

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
_MAX_NAME_NBYTES = 63
"""ggml's `GGML_MAX_NAME`, less the NUL."""
_MAX_RANK = 4
_MAX_KEYS = 1 << 16
_MAX_ELEMENTS = 1 << 22
"""In all arrays of a file: several times what a tokenizer of half a million tokens has."""
_MAX_COUNT = 1 << 48

_SCALARS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
"""Numbers and `struct` codes of the types that have a fixed size."""
_STRING, _ARRAY = 8, 9
_KINDS = {number: kind for kind, (number, _) in _SCALARS.items()} | {_STRING: "string", _ARRAY: "array"}
_NUMBERS = {kind: number for number, kind in _KINDS.items()}

_CODES = {
    DType.F32: 0,
    DType.F16: 1,
    DType.Q4_0: 2,
    DType.Q8_0: 8,
    DType.I8: 24,
    DType.I16: 25,
    DType.I32: 26,
    DType.I64: 27,
    DType.F64: 28,
    DType.BF16: 30,
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_QUANTISED = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1"}
_QUANTISED |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
_QUANTISED |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"}
_QUANTISED |= {23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}
"""Types of ggml that are not read here."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file: its tensors in the order of their bytes, and its metadata with types."""

    file: SourceFile
    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any]


def gguf_layout(tensors: Sequence[tuple[str, TensorSpec]], metadata: Mapping[str, Any]) -> Layout:
    """The file `GGUFWriter` writes for these tensors and this metadata, both in their order, the architecture first.

    Raises `UsageError` for names of more than 63 bytes, more than 4 dimensions, dtypes that ggml does not have, and
    values that their types cannot hold.
    """
    alignment = _alignment(metadata)
    if alignment is None:
        raise UsageError(f"{_ALIGNMENT_KEY} must be a power of two, as uint32")
    infos, pieces, offset = bytearray(), list[Data | Literal](), 0
    for name, spec in tensors:
        infos += _info(name, spec, offset)
        pieces.append(Data(name, spec.nbytes))
        if padding := -spec.nbytes % alignment:
            pieces.append(Literal(bytes(padding)))
        offset += spec.nbytes + padding
    head = bytearray(_MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key in sorted(metadata, key=lambda key: key != "general.architecture"):
        head += _pair(key, metadata[key])
    head += infos
    head += bytes(-len(head) % alignment)
    return Layout((Literal(bytes(head)), *pieces), {})


def _alignment(metadata: Mapping[str, Any]) -> int | None:
    """The alignment that metadata asks for; None if it makes no sense."""
    value = metadata.get(_ALIGNMENT_KEY, {"uint32": _ALIGNMENT}).get("uint32")
    return value if isinstance(value, int) and value > 0 and value & (value - 1) == 0 else None


def _info(name: str, spec: TensorSpec, offset: int) -> bytes:
    """What the header says of a tensor; ggml counts dimensions from the last."""
    where, code = escape(name), _CODES.get(spec.dtype)
    if code is None:
        types = " ".join(dtype.name for dtype in _CODES)
        raise UsageError(f"{where}: GGUF has no {spec.dtype.value}", hint=f"it has {types}")
    if not _is_name(name.encode()):
        raise UsageError(f"{where}: the name of a tensor in a GGUF file has at most {_MAX_NAME_NBYTES} bytes")
    if len(spec.shape) > _MAX_RANK or not _is_blocks(spec):
        raise UsageError(f"{where}: a GGUF file cannot hold {spec}")
    return _string(name) + struct.pack(f"<I{len(spec.shape)}QIQ", len(spec.shape), *reversed(spec.shape), code, offset)


def _is_name(name: bytes) -> bool:
    return len(name) <= _MAX_NAME_NBYTES and b"\0" not in name


def _is_blocks(spec: TensorSpec) -> bool:
    """Whether rows are whole blocks, for the types that have any."""
    return not spec.dtype.is_packed or (len(spec.shape) > 0 and spec.shape[-1] % spec.dtype.block[0] == 0)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pair(key: str, value: Mapping[str, Any]) -> bytes:
    """A key of metadata and its value."""
    try:
        ((kind, content),) = value.items()
        if kind == "array":
            inner, items = content
            return _string(key) + struct.pack("<IIQ", _ARRAY, _NUMBERS[inner], len(items)) + _packed(inner, items)
        return _string(key) + struct.pack("<I", _NUMBERS[kind]) + _packed(kind, [content])
    except (struct.error, OverflowError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{escape(key)}: GGUF cannot hold {escape(repr(value)[:80])} ({escape(str(error))})") from None


def _packed(kind: str, items: Sequence[Any]) -> bytes:
    if kind == "string":
        return b"".join(map(_string, items))
    return struct.pack(f"<{len(items)}{_SCALARS[kind][1]}", *items)


def read_gguf(file: SourceFile, files: FileReader) -> GgufFile:
    """Read a header; raises `CorruptInput` unless it describes every byte of the file exactly once.

    Raises `UsageError` for quantised types other than Q8_0 and Q4_0.
    """
    name = file.shown
    magic = files.read(file, 0, min(64, file.nbytes))
    if not magic.startswith(_MAGIC):
        raise explain(magic, name, "the file does not begin with GGUF")
    header = _Header(file, files)
    version = header.uint32()
    if version not in (2, 3):
        order = "big-endian files are not read" if version % 65536 == 0 else "2 and 3 are read"
        raise CorruptInput(f"{name}: GGUF version {version}: {order}")
    n_tensors, n_keys = header.count(MAX_TENSORS, "tensors"), header.count(_MAX_KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = header.string()
        if key in metadata:
            raise CorruptInput(f"{name}: has the key {escape(key)} twice")
        metadata[key] = header.typed(key)
    infos = list(_infos(header, n_tensors, name))
    alignment = _alignment(metadata)
    if alignment is None:
        raise CorruptInput(f"{name}: {_ALIGNMENT_KEY} must be a power of two, as uint32")
    start = header.position + -header.position % alignment
    end, position, tensors = header.position, 0, dict[str, LazyTensor]()
    for key, spec, offset in infos:
        if key in tensors:
            raise CorruptInput(f"{name}: has the tensor {escape(key)} twice")
        if offset != position:
            raise CorruptInput(f"{name}: {escape(key)} begins at byte {offset} of the data, expected {position}")
        tensors[key] = LazyTensor.make(Stored(file, start + offset, spec.dtype, spec.shape))
        end = start + position + spec.nbytes
        position += spec.nbytes + -spec.nbytes % alignment
    if not end <= file.nbytes <= start + position:
        fault = "truncated" if end > file.nbytes else "followed by bytes that belong to no tensor"
        raise CorruptInput(f"{name}: {fault}: the header describes {end} bytes, found {file.nbytes}")
    return GgufFile(file, tensors, metadata)


def _infos(header: _Header, count: int, name: str) -> Iterator[tuple[str, TensorSpec, int]]:
    """Name, spec and offset of each tensor."""
    for _ in range(count):
        key = header.string()
        where, rank = f"{name}: {escape(key)}", header.uint32()
        if not _is_name(key.encode()) or rank > _MAX_RANK:
            raise CorruptInput(f"{where}: a name of more than {_MAX_NAME_NBYTES} bytes, or {rank} dimensions")
        *reversed_shape, code, offset = struct.unpack(f"<{rank}QIQ", header.take(rank * 8 + 12))
        if code in _QUANTISED:
            hint = "weightops reads F32 F16 BF16 Q8_0 Q4_0: take a file of one of these, or the original checkpoint"
            raise UsageError(f"{where}: is {_QUANTISED[code]}, which is not read", hint=hint)
        if code not in _DTYPES:
            raise CorruptInput(f"{where}: unknown type {code}")
        spec = TensorSpec(_DTYPES[code], tuple(reversed(reversed_shape)))
        if max(spec.shape, default=0) >= _MAX_COUNT or not _is_blocks(spec):
            raise CorruptInput(f"{where}: there is no {spec}")
        yield key, spec, offset


class _Header:
    """The header from behind its magic number, read as far as it is asked for."""

    def __init__(self, file: SourceFile, files: FileReader) -> None:
        self.position = len(_MAGIC)
        """In the file, of what comes next."""
        self._file, self._files = file, files
        self._block, self._block_start = b"", 0
        self._elements = 0

    def take(self, nbytes: int) -> bytes:
        """The next `nbytes`; raises `CorruptInput` where the file, or what a header may have, ends before."""
        stop = self.position + nbytes
        if stop > min(self._file.nbytes, MAX_HEADER_NBYTES):
            raise CorruptInput(
                f"{self._file.shown}: the header goes on to byte {stop}, the file has {self._file.nbytes} bytes and a "
                f"header at most {MAX_HEADER_NBYTES}"
            )
        if stop > self._block_start + len(self._block):
            ahead = min(max(2 * len(self._block), 1 << 16), 4 << 20)
            length = min(max(nbytes, ahead), self._file.nbytes - self.position)
            self._block, self._block_start = self._files.read(self._file, self.position, length), self.position
        begin = self.position - self._block_start
        self.position = stop
        return self._block[begin : begin + nbytes]

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self, most: int, what: str) -> int:
        found = self.uint64()
        if found > most:
            raise CorruptInput(f"{self._file.shown}: the header lists {found} {what}, at most {most} are read")
        return found

    def string(self) -> str:
        try:
            return self.take(self.uint64()).decode()
        except UnicodeDecodeError:
            raise CorruptInput(f"{self._file.shown}: a text before byte {self.position} is not UTF-8") from None

    def typed(self, key: str) -> dict[str, Any]:
        """A value and its type."""
        kind = self._kind(key)
        if kind != "array":
            return {kind: self._values(kind, 1, key)[0]}
        inner, count = self._kind(key), self.uint64()
        self._elements += count
        if inner == "array" or self._elements > _MAX_ELEMENTS:
            where = f"{self._file.shown}: {escape(key)}"
            raise CorruptInput(f"{where}: arrays in arrays are not read, nor more than {_MAX_ELEMENTS} elements")
        return {"array": [inner, self._values(inner, count, key)]}

    def _kind(self, key: str) -> str:
        number = self.uint32()
        if number not in _KINDS:
            raise CorruptInput(f"{self._file.shown}: {escape(key)}: unknown type {number}")
        return _KINDS[number]

    def _values(self, kind: str, count: int, key: str) -> list[Any]:
        if kind == "string":
            return [self.string() for _ in range(count)]
        form = f"<{count}{_SCALARS[kind][1]}"
        data = self.take(struct.calcsize(form))
        if kind == "bool" and not {*data} <= {0, 1}:
            raise CorruptInput(f"{self._file.shown}: {escape(key)}: a bool must be 0 or 1")
        return list(struct.unpack(form, data))
