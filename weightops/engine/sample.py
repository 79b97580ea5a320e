"""Whether source files still hold what an earlier run read of them.

Name, size and modification time can agree by accident: images, archives and mounts often give every file one date.
The beginnings and ends of files say little either, since fine-tunes of one base share them. So of every tensor that a
finished shard was made of some bytes are digested, when it is written and again before it is kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.stores.reader import FileReader

_PIECE_NBYTES = 4096


def sample(tensors: Iterable[LazyTensor], files: FileReader) -> str:
    """xxh3_128 over the first, middle and last 4 KiB of all that the tensors are made of, in the order of its use.

    Files on servers are left out: a digest or ETag tells them apart. Raises as `FileReader.read_into`.
    """
    state = xxhash.xxh3_128()
    for file, start, stop in _extents(tensors):
        nbytes = stop - start
        size = min(_PIECE_NBYTES, nbytes)
        for offset in dict.fromkeys((0, (nbytes - size) // 2, nbytes - size)):
            state.update(files.read(file, start + offset, size))
    return state.hexdigest()


def _extents(tensors: Iterable[LazyTensor]) -> dict[tuple[SourceFile, int, int], None]:
    ops = (node.op for tensor in tensors for node in tensor.walk())
    return {(op.source, *op.extent): None for op in ops if op.source is not None and not op.source.is_remote}
