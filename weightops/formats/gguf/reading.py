"""GGUF files, versions 2 and 3, in either order of bytes: header to lazy tensors and metadata.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp's `gguf_init_from_file` refuses is
refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.formats.gguf.header import Header
from weightops.formats.gguf.metadata import kind_of
from weightops.formats.gguf.types import DTYPES, REMOVED
from weightops.formats.safetensors import MAX_TENSORS
from weightops.formats.sniff import explain
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.ggml.swapped import Swapped, can_swap
from weightops.ops.stored import Stored
from weightops.spec import TensorSpec
from weightops.stores.reader import FileReader

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
ALIGNMENT = 32
MAX_NAME_NBYTES = 63
"""ggml's `GGML_MAX_NAME`, less the NUL."""
MAX_RANK = 4
_MAX_KEYS = 1 << 16
_MAX_COUNT = 1 << 48


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file: its tensors in the order of their bytes, and its metadata with types."""

    file: SourceFile
    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any]

    @property
    def kind(self) -> str:
        """What it is: model, adapter, mmproj, imatrix, ...; see `weightops.formats.gguf.metadata.kind_of`."""
        return kind_of(self.metadata)


def read_gguf(file: SourceFile, files: FileReader) -> GgufFile:
    """Read a header; raises `CorruptInput` unless it describes every byte of the file exactly once.

    Raises `UsageError` for types that ggml no longer has, and in files of big-endian machines for IQ2_XXS.
    """
    name = file.shown
    magic = files.read(file, 0, min(64, file.nbytes))
    if not magic.startswith(MAGIC):
        raise explain(magic, name, "the file does not begin with GGUF")
    header = Header(file, files, len(MAGIC))
    version = header.uint32()
    if version and version % 65536 == 0:
        header.order, version = ">", int.from_bytes(version.to_bytes(4, "little"))
    if version not in (2, 3):
        raise CorruptInput(f"{name}: GGUF version {version}: 2 and 3 are read")
    n_tensors, n_keys = header.count(MAX_TENSORS, "tensors"), header.count(_MAX_KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = header.string()
        if key in metadata:
            raise CorruptInput(f"{name}: has the key {escape(key)} twice")
        metadata[key] = header.typed(key)
    infos = list(_infos(header, n_tensors, name))
    alignment = alignment_of(metadata)
    if alignment is None:
        raise CorruptInput(f"{name}: {ALIGNMENT_KEY} must be a power of two, as uint32")
    start = header.position + -header.position % alignment
    end, position, tensors = header.position, 0, dict[str, LazyTensor]()
    for key, spec, offset in infos:
        if key in tensors:
            raise CorruptInput(f"{name}: has the tensor {escape(key)} twice")
        if offset != position:
            raise CorruptInput(f"{name}: {escape(key)} begins at byte {offset} of the data, expected {position}")
        stored = LazyTensor.make(Stored(file, start + offset, spec.dtype, spec.shape))
        tensors[key] = LazyTensor.make(Swapped(), stored) if header.order == ">" else stored
        end = start + position + spec.nbytes
        position += spec.nbytes + -spec.nbytes % alignment
    if not end <= file.nbytes <= start + position:
        fault = "truncated" if end > file.nbytes else "followed by bytes that belong to no tensor"
        raise CorruptInput(f"{name}: {fault}: the header describes {end} bytes, found {file.nbytes}")
    return GgufFile(file, tensors, metadata)


def alignment_of(metadata: Mapping[str, Any]) -> int | None:
    """The alignment that metadata asks for; None if it makes no sense."""
    value = metadata.get(ALIGNMENT_KEY, {"uint32": ALIGNMENT}).get("uint32")
    return value if isinstance(value, int) and value > 0 and value & (value - 1) == 0 else None


def is_name(name: bytes) -> bool:
    """Whether ggml has room for a tensor's name."""
    return len(name) <= MAX_NAME_NBYTES and b"\0" not in name


def is_blocks(spec: TensorSpec) -> bool:
    """Whether rows are whole blocks, for the types that have any."""
    return not spec.dtype.is_packed or (len(spec.shape) > 0 and spec.shape[-1] % spec.dtype.block[0] == 0)


def _infos(header: Header, count: int, name: str) -> Iterator[tuple[str, TensorSpec, int]]:
    """Name, spec and offset of each tensor."""
    for _ in range(count):
        key = header.string()
        where, rank = f"{name}: {escape(key)}", header.uint32()
        if not is_name(key.encode()) or rank > MAX_RANK:
            raise CorruptInput(f"{where}: a name of more than {MAX_NAME_NBYTES} bytes, or {rank} dimensions")
        *reversed_shape, code, offset = header.numbers(f"{rank}QIQ")
        if code in REMOVED:
            hint = "take a file of another type, or the original checkpoint"
            raise UsageError(f"{where}: is {REMOVED[code]}, a type that ggml no longer has", hint=hint)
        if code not in DTYPES:
            raise CorruptInput(f"{where}: unknown type {code}", hint="was the file written by a newer ggml?")
        spec = TensorSpec(DTYPES[code], tuple(reversed(reversed_shape)))
        if max(spec.shape, default=0) >= _MAX_COUNT or not is_blocks(spec):
            raise CorruptInput(f"{where}: there is no {spec}")
        if header.order == ">" and not can_swap(spec.dtype):
            raise UsageError(
                f"{where}: is {spec.dtype.value} in a file of a big-endian machine, which is not read",
                hint="its numbers of 16 and of 32 bits share bytes; take the file for other machines",
            )
        yield key, spec, offset
