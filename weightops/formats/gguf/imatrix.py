"""Importance matrices of `llama-imatrix`: how much each column of a weight matters, as `llama-quantize` takes it.

There are two forms: GGUF files (`NAME.in_sum2` and `NAME.counts` for each weight), and the older `.dat`, little-endian:
int32 entries; for each int32 length, name, int32 calls, int32 n, n float32 sums; then, in most, int32 chunks, int32
length and the name of the text that it was made of. Either has sums of squares and what they are to be divided by.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.errors import CorruptInput, UsageError
from weightops.formats.gguf.metadata import Strings, number
from weightops.formats.gguf.reading import MAGIC, GgufFile, read_gguf
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import Evaluator
from weightops.spec import DType
from weightops.stores.reader import FileReader
from weightops.stores.stores import Stores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_ENTRIES = 1 << 20
_MAX_NAME = 4096


@dataclass(frozen=True)
class ImportanceMatrix:
    """By the name of each weight `[rows, columns]` the importance of its columns, float32 `[columns]`.

    Of one that stacks matrices for experts it is `[experts, columns]`, in a `.dat` all in one row. `chunks` is how many
    pieces of text it was made of, `datasets` which.
    """

    weights: dict[str, Floats]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


def read_imatrix(file: SourceFile, stores: Stores | None = None) -> ImportanceMatrix:
    """The importance matrix in a file, in either form; what lies beyond this machine is read through `stores`.

    Raises `UsageError` for a GGUF file that is something else, `CorruptInput` for what is malformed.
    """
    with (stores or Stores()).connected() as stores, Evaluator(stores) as evaluate:
        if evaluate.files.read(file, 0, min(len(MAGIC), file.nbytes)) == MAGIC:
            return _of_gguf(read_gguf(file, evaluate.files), evaluate)
        return _Dat(file, evaluate.files).read()


def _of_gguf(found: GgufFile, evaluate: Evaluator) -> ImportanceMatrix:
    import numpy as np

    where = found.file.shown
    if found.kind != "imatrix":
        raise UsageError(
            f"{where}: is no importance matrix: its general.type is {escape(found.kind)}",
            hint="llama-imatrix makes one of a model and a text",
        )
    weights: dict[str, Floats] = {}
    for name, tensor in found.tensors.items():
        weight = name.removesuffix(_SUMS)
        if weight == name:
            continue
        counts = found.tensors.get(f"{weight}{_COUNTS}")
        if counts is None:
            raise CorruptInput(f"{where}: {escape(name)} has no {escape(weight)}{_COUNTS} beside it")
        experts = counts.spec.numel
        if tensor.spec.dtype is not DType.F32 or counts.spec.dtype is not DType.F32 or not tensor.spec.numel:
            raise CorruptInput(f"{where}: {escape(name)} is {tensor.spec} and its counts {counts.spec}, not float32")
        if not experts or tensor.spec.shape[:-1] not in ((experts,), () if experts == 1 else (experts,)):
            raise CorruptInput(f"{where}: {escape(name)} is {list(tensor.spec.shape)}, and there are {experts} counts")
        sums, by = (np.frombuffer(evaluate.whole(each), np.float32).reshape(experts, -1) for each in (tensor, counts))
        with np.errstate(all="ignore"):
            means: Floats = np.where(by > 0, sums / by, 1).astype(np.float32)
        weights[weight] = means[0] if experts == 1 else means
    if not weights:
        raise CorruptInput(f"{where}: holds no {_SUMS[1:]} of any weight")
    names = found.metadata.get("imatrix.datasets", {}).get("array", ["string", []])[1]
    datasets = tuple(names) if isinstance(names, Strings) else ()
    return ImportanceMatrix(weights, datasets, number(found.metadata, "imatrix.chunk_count") or 0, found.metadata)


class _Dat:
    """A `.dat`, number by number."""

    def __init__(self, file: SourceFile, files: FileReader) -> None:
        self._file, self._files = file, files
        self._position = 0

    def read(self) -> ImportanceMatrix:
        import numpy as np

        weights: dict[str, Floats] = {}
        for _ in range(self._count(_MAX_ENTRIES, "entries")):
            name = self._text()
            (calls,) = struct.unpack("<i", self._take(4))
            sums = np.frombuffer(self._take(4 * self._count(self._file.nbytes, f"numbers of {escape(name)}")), "<f4")
            if name in weights:
                raise CorruptInput(f"{self._file.shown}: has {escape(name)} twice")
            weights[name] = np.asarray(sums / np.float32(calls), np.float32) if calls > 0 else sums
        if self._position == self._file.nbytes:
            return ImportanceMatrix(weights)
        (chunks,) = struct.unpack("<i", self._take(4))
        return ImportanceMatrix(weights, (self._text(),) if self._position < self._file.nbytes else (), chunks)

    def _take(self, nbytes: int) -> bytes:
        stop = self._position + nbytes
        if stop > self._file.nbytes:
            raise CorruptInput(
                f"{self._file.shown}: truncated: an importance matrix that goes on to byte {stop}, found "
                f"{self._file.nbytes}",
                hint="is it an importance matrix at all?",
            )
        found = self._files.read(self._file, self._position, nbytes)
        self._position = stop
        return found

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
