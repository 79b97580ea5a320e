"""safetensors files: header to lazy tensors, and specs to a file layout.

Format: https://github.com/huggingface/safetensors#format. The reader is stricter than the library where the
library accepts what two readers could understand differently; the layout is byte-identical to its `save_file`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.formats.layout import Data, Layout, Literal
from weightops.formats.sniff import explain
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.reflink import Extent, fit_header
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.arrange import Agreed
from weightops.ops.elementwise import Reinterpret
from weightops.ops.measures.witness import Witness
from weightops.ops.stored import Checked, Stored
from weightops.spec import DType, TensorSpec
from weightops.stores.reader import FileReader

MAX_HEADER_NBYTES = 100_000_000
MAX_RANK = 64
MAX_TENSORS = 250_000
"""Per file: above what any model has, below what takes long to read."""
_MAX_COUNT = 1 << 48
_ORDER = {dtype: i for i, dtype in enumerate(DType)}
_UNCHANGED = (Agreed, Checked, Reinterpret, Witness)
"""Ops that give the bytes of their first input."""


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """One file: its tensors in the order of their bytes, and the header's `__metadata__`."""

    file: SourceFile
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says: of each tensor its spec and where it begins, in the order of their bytes; where those end.

    `nbytes` are those of the header itself, with its length.
    """

    nbytes: int
    tensors: dict[str, tuple[TensorSpec, int]]
    end: int
    metadata: dict[str, str]


def read_safetensors(file: SourceFile, files: FileReader) -> SafetensorsFile:
    """Read a header; raises `CorruptInput` unless it describes every byte of the file exactly once."""
    header = read_header(file, files)
    end = header.nbytes + header.end
    if end != file.nbytes:
        fault = "truncated" if end > file.nbytes else "followed by bytes that belong to no tensor"
        raise CorruptInput(f"{file.shown}: {fault}: the header describes {end} bytes, found {file.nbytes}")
    tensors = {
        key: LazyTensor.make(Stored(file, header.nbytes + begin, spec.dtype, spec.shape))
        for key, (spec, begin) in header.tensors.items()
    }
    return SafetensorsFile(file, tensors, header.metadata)


def read_header(file: SourceFile, files: FileReader, offset: int = 0) -> Header:
    """Read the header at `offset`; raises `CorruptInput` unless its tensors lie one after the other."""
    name, left = file.shown, max(0, file.nbytes - offset)
    head = files.read(file, offset, min(64, left))
    if left < 8:
        raise explain(head, name, f"{file.nbytes} bytes is too short for a safetensors file")
    header_nbytes = int.from_bytes(head[:8], "little")
    if header_nbytes > min(MAX_HEADER_NBYTES, left - 8):
        raise explain(head, name, f"header of {header_nbytes} bytes in a file of {file.nbytes}")
    if head[8:9] != b"{":
        raise explain(head, name, "the header does not begin with '{'")
    header = strict_json.load_object(files.read(file, offset + 8, header_nbytes), f"{name}: header")
    if len(header) > MAX_TENSORS:
        raise CorruptInput(f"{name}: the header lists {len(header)} tensors, at most {MAX_TENSORS} are read")
    metadata = _metadata(header.pop("__metadata__", None), name)
    entries = [(*_entry(key, value, name), key) for key, value in header.items()]
    entries.sort(key=lambda e: (e[1], e[2]))
    position = 0
    tensors = {}
    for spec, begin, end, key in entries:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise CorruptInput(f"{name}: {escape(key)} begins at byte {begin} and {fault}, expected {position}")
        position = end
        tensors[key] = (spec, begin)
    return Header(8 + header_nbytes, tensors, position, metadata)


def _metadata(value: Any, name: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CorruptInput(f"{name}: __metadata__ must map strings to strings")
    return value


def _entry(key: str, value: Any, name: str) -> tuple[TensorSpec, int, int]:
    """Spec, begin and end of one header entry."""
    where = f"{name}: {escape(key)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptInput(f"{where}: expected exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DType.__members__.get(code) if isinstance(code, str) else None
    if dtype is None or not dtype.in_safetensors:
        raise CorruptInput(f"{where}: unknown dtype {escape(str(code)[:100])!r}")
    if not _is_counts(shape) or len(shape) > MAX_RANK:
        raise CorruptInput(f"{where}: the shape must be at most {MAX_RANK} sizes, each a count below 2**48")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptInput(f"{where}: data_offsets must be two ascending counts")
    spec = TensorSpec(dtype, tuple(shape))
    begin, end = offsets
    if spec.numel * dtype.bits != (end - begin) * 8:
        raise CorruptInput(
            f"{where}: {spec} takes {spec.numel * dtype.bits} bits, its offsets span {end - begin} bytes"
        )
    return spec, begin, end


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _MAX_COUNT for n in value)


def safetensors_layout(tensors: Sequence[tuple[str, TensorSpec]], metadata: Mapping[str, str]) -> Layout:
    """The file `safetensors.torch.save_file` writes: by descending alignment, then name; header padded to 8.

    `save_file` itself writes several metadata keys in an order that varies; here they are sorted.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    pieces = []
    position = 0
    for name, spec in sorted(tensors, key=lambda t: (-_ORDER[t[1].dtype], t[0].encode())):
        if not spec.dtype.in_safetensors:
            hint = (
                "`weightops dequantize` makes plain weights of GGUF files"
                if spec.dtype.is_block
                else "use --format torch"
            )
            raise UsageError(f"{escape(name)}: safetensors has no {spec.dtype.value}", hint=hint)
        end = position + spec.nbytes
        header[name] = {"dtype": spec.dtype.name, "shape": spec.shape, "data_offsets": (position, end)}
        pieces.append(Data(name, spec.nbytes))
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Layout((Literal(len(text).to_bytes(8, "little") + text), *pieces), {})


@dataclass(frozen=True, slots=True)
class SharingLayout(Layout):
    """A file that has blocks in common with others. `shared` gives them by source; `name` is the file's own."""

    name: str
    shared: Mapping[SourceFile, Sequence[Extent]]


def sharing_layout(name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> SharingLayout:
    """The same file with more spaces behind its header, as many as let it share most blocks with its sources.

    What can be shared are tensors that go out as they lie in files on this machine. Without any the file is the one
    that `save_file` writes.
    """
    plain = safetensors_layout([(key, tensor.spec) for key, tensor in tensors.items()], metadata)
    header, *pieces = plain.pieces
    assert isinstance(header, Literal)
    extents: dict[SourceFile, list[Extent]] = {}
    position = 0
    for piece in pieces:
        assert isinstance(piece, Data)
        stored = _stored(tensors[piece.name])
        if stored is not None and not stored.file.is_remote:
            extents.setdefault(stored.file, []).append(Extent(stored.offset, position, piece.nbytes))
        position += piece.nbytes
    padding, shared = fit_header(header.nbytes, extents)
    text = header.data[8:] + b" " * padding
    return SharingLayout((Literal(len(text).to_bytes(8, "little") + text), *pieces), {}, name, shared)


def _stored(tensor: LazyTensor) -> Stored | None:
    """Where the tensor's bytes lie as they are, if they do."""
    while isinstance(tensor.op, _UNCHANGED):
        tensor = tensor.inputs[0]
    return tensor.op if isinstance(tensor.op, Stored) else None
