"""Importance matrices of `llama-imatrix`: how much each column of a weight matters, as `llama-quantize` takes it.

There are two forms: GGUF files (`NAME.in_sum2` and `NAME.counts` for each weight), and the older `.dat`, little-endian:
int32 entries; for each int32 length, name, int32 calls, int32 n, n float32 sums; then, in most, int32 chunks, int32
length and the name of the text that it was made of. Either has sums of squares and what they are to be divided by.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.formats.gguf.metadata import Strings, number, plain
from weightops.formats.gguf.reading import MAGIC, GgufFile, read_gguf
from weightops.formats.layout import Data, Layout, Literal
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.ggml.importance import Importance
from weightops.ops.rows import Given
from weightops.ops.stored import Stored
from weightops.spec import DType
from weightops.stores.reader import FileReader
from weightops.stores.stores import Stores

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
CALLS = "imatrix.calls"
"""Of the older form alone, and in no file under a name: the calls of each weight."""
_MAX_ENTRIES = 1 << 20
_MAX_NAME = 4096


@dataclass(frozen=True)
class ImportanceMatrix:
    """By the name of each weight `[rows, columns]` the importance of its columns, float32 `[columns]`.

    Of one that stacks matrices for experts it is `[experts, columns]`, in a `.dat` all in one row. `chunks` is how many
    pieces of text it was made of, `datasets` which. `name` is that of its file.
    """

    name: str
    weights: dict[str, LazyTensor]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


def read_imatrix(file: SourceFile, stores: Stores | None = None) -> ImportanceMatrix:
    """The importance matrix in a file, in either form, of which names and sizes are read.

    What lies beyond this machine is read through `stores`.

    Raises `UsageError` for a GGUF file that is something else, `CorruptInput` for what is malformed.
    """
    with (stores or Stores()).connected() as stores, FileReader(stores) as files:
        if files.read(file, 0, min(len(MAGIC), file.nbytes)) == MAGIC:
            return _of_gguf(read_gguf(file, files))
        return _Dat(file, files).read()


def _of_gguf(found: GgufFile) -> ImportanceMatrix:
    where = found.file.shown
    if found.kind != "imatrix":
        raise UsageError(
            f"{where}: is no importance matrix: its general.type is {escape(found.kind)}",
            hint="llama-imatrix makes one of a model and a text",
        )
    weights: dict[str, LazyTensor] = {}
    for name, tensor in found.tensors.items():
        weight = name.removesuffix(SUMS)
        if weight == name:
            continue
        counts = found.tensors.get(f"{weight}{COUNTS}")
        if counts is None:
            raise CorruptInput(f"{where}: {escape(name)} has no {escape(weight)}{COUNTS} beside it")
        experts = counts.spec.numel
        if tensor.spec.dtype is not DType.F32 or counts.spec.dtype is not DType.F32 or not tensor.spec.numel:
            raise CorruptInput(f"{where}: {escape(name)} is {tensor.spec} and its counts {counts.spec}, not float32")
        if not experts or tensor.spec.shape[:-1] not in ((experts,), () if experts == 1 else (experts,)):
            raise CorruptInput(f"{where}: {escape(name)} is {list(tensor.spec.shape)}, and there are {experts} counts")
        weights[weight] = LazyTensor.make(Importance(), tensor, counts)
    if not weights:
        raise CorruptInput(f"{where}: holds no {SUMS[1:]} of any weight")
    names = found.metadata.get(DATASETS, {}).get("array", ["string", []])[1]
    datasets = tuple(names) if isinstance(names, Strings) else ()
    return ImportanceMatrix(found.file.name, weights, datasets, number(found.metadata, CHUNKS) or 0, found.metadata)


def dat_layout(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, Any]) -> Layout:
    """The `.dat` of these tensors, which are multiplied by calls; metadata is that of a GGUF file, and `CALLS`."""
    pieces: list[Literal | Data] = [Literal(struct.pack("<i", len(tensors)))]
    for (name, tensor), calls in zip(tensors.items(), plain(metadata[CALLS]), strict=True):
        pieces.append(Literal(_text(name) + struct.pack("<ii", calls, tensor.spec.numel)))
        pieces.append(Data(name, tensor.nbytes))
    dataset = next(iter(plain(metadata[DATASETS])[-1:]), "")
    return Layout((*pieces, Literal(struct.pack("<i", plain(metadata[CHUNKS])) + _text(dataset))), {})


def _text(value: str) -> bytes:
    return struct.pack("<i", len(value.encode())) + value.encode()


class _Dat:
    """A `.dat`, number by number."""

    def __init__(self, file: SourceFile, files: FileReader) -> None:
        self._file, self._files = file, files
        self._position = 0

    def read(self) -> ImportanceMatrix:
        weights: dict[str, LazyTensor] = {}
        for _ in range(self._count(_MAX_ENTRIES, "entries")):
            name = self._text()
            (calls,) = struct.unpack("<i", self._take(4))
            count = self._count(self._file.nbytes, f"numbers of {escape(name)}")
            if name in weights:
                raise CorruptInput(f"{self._file.shown}: has {escape(name)} twice")
            sums = LazyTensor.make(Stored(self._file, self._position, DType.F32, (count,)))
            self._pass(4 * count)
            by = LazyTensor.make(Given(DType.F32, (1,), struct.pack("<f", calls)))
            weights[name] = LazyTensor.make(Importance(), sums, by) if calls > 0 else sums
        if self._position == self._file.nbytes:
            return ImportanceMatrix(self._file.name, weights)
        (chunks,) = struct.unpack("<i", self._take(4))
        return ImportanceMatrix(
            self._file.name, weights, (self._text(),) if self._position < self._file.nbytes else (), chunks
        )

    def _take(self, nbytes: int) -> bytes:
        start = self._position
        self._pass(nbytes)
        return self._files.read(self._file, start, nbytes)

    def _pass(self, nbytes: int) -> None:
        stop = self._position + nbytes
        if stop > self._file.nbytes:
            raise CorruptInput(
                f"{self._file.shown}: truncated: an importance matrix that goes on to byte {stop}, found "
                f"{self._file.nbytes}",
                hint="is it an importance matrix at all?",
            )
        self._position = stop

    def _count(self, most: int, what: str) -> int:
        (found,) = struct.unpack("<i", self._take(4))
        if not 0 < found <= most:
            raise CorruptInput(
                f"{self._file.shown}: says that it has {found} {what}, expected from 1 to {most}",
                hint="is it an importance matrix at all?",
            )
        return int(found)

    def _text(self) -> str:
        length = self._count(_MAX_NAME, "bytes in a name")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise CorruptInput(f"{self._file.shown}: a name before byte {self._position} is not UTF-8") from None
