"""Compressed deltas, `.wdelta`: a safetensors file whose tensors are put down in blocks that zstd has made smaller.

    8 bytes      `MAGIC`
    header       of the safetensors file that this stands for, to the byte: its length, and JSON
    blocks       the tensors in the order of their bytes there, each in coded blocks (`weightops.ops.byte_planes`)
    4 bytes each how many bytes each block takes

How many blocks there are follows from the header, and so where their lengths begin; what is behind the header depends
on the tensors' bytes, and that is why the lengths come last. docs/formats.md says the same for who writes a reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from weightops.errors import CorruptInput, UsageError
from weightops.formats.layout import Coded, Data, Layout, Lengths, Literal
from weightops.formats.safetensors import SafetensorsFile, read_header, safetensors_layout
from weightops.formats.sniff import explain
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.byte_planes import BLOCK_NBYTES, count_blocks, encode, pack_lengths, unpack_lengths
from weightops.ops.compressed import Compressed
from weightops.stores.reader import FileReader

SUFFIX = ".wdelta"
MAGIC = b"WDELTA\x00\x01"
"""The last byte is the version: another one is another format."""
MAX_BLOCKS = 1 << 22
"""Of a file: 4.4 TB of tensors, and 17 MB of lengths."""
_DAMAGED = "the file is not whole, or was damaged after it was written: fetch it again"


def compressed_layout(name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Layout:
    """The file for these tensors; what its blocks take is known when they have been made.

    Raises `UsageError` for more of them than are read.
    """
    header, *pieces = safetensors_layout([(key, tensor.spec) for key, tensor in tensors.items()], metadata).pieces
    assert isinstance(header, Literal)
    coded = []
    for piece in pieces:
        assert isinstance(piece, Data)
        code = partial(encode, itemsize=tensors[piece.name].spec.dtype.itemsize)
        coded.append(Coded(piece.name, piece.nbytes, BLOCK_NBYTES, code))
    blocks = sum(count_blocks(piece.nbytes) for piece in coded)
    if blocks > MAX_BLOCKS:
        raise UsageError(
            f"{escape(name)}: a compressed delta has at most {MAX_BLOCKS} blocks of 1 MiB in a file, here are {blocks}",
            hint="give a smaller --max-shard-size",
        )
    return Layout((Literal(MAGIC + header.data), *coded, Lengths(4 * blocks, pack_lengths)), {})


def read_compressed(file: SourceFile, files: FileReader) -> SafetensorsFile:
    """The tensors of the safetensors file that this stands for.

    Raises `CorruptInput` unless the header and the lengths of the blocks describe every byte of the file exactly once.
    """
    head = files.read(file, 0, min(64, file.nbytes))
    if not head.startswith(MAGIC):
        raise explain(head, file.shown, "it does not begin as a compressed delta of this version does")
    header = read_header(file, files, len(MAGIC))
    start = len(MAGIC) + header.nbytes
    blocks = sum(count_blocks(spec.nbytes) for spec, _ in header.tensors.values())
    end = file.nbytes - 4 * blocks
    if blocks > MAX_BLOCKS:
        raise CorruptInput(f"{file.shown}: the header describes {blocks} blocks, at most {MAX_BLOCKS} are read")
    if end < start:
        raise CorruptInput(f"{file.shown}: {file.nbytes} bytes are too few for {blocks} blocks", hint=_DAMAGED)
    lengths = unpack_lengths(files.read(file, end, 4 * blocks))
    tensors = {}
    position, first = start, 0
    for key, (spec, _) in header.tensors.items():
        own = lengths[first : first + count_blocks(spec.nbytes)]
        for i, length in enumerate(own):
            holds = min(BLOCK_NBYTES, spec.nbytes - i * BLOCK_NBYTES)
            if length > holds:
                raise CorruptInput(
                    f"{file.shown}: block {first + i} takes {length} bytes, and holds {holds}", hint=_DAMAGED
                )
        tensors[key] = LazyTensor.make(Compressed(file, position, spec.dtype, spec.shape, pack_lengths(own)))
        position, first = position + sum(own), first + len(own)
    if position != end:
        raise CorruptInput(
            f"{file.shown}: its blocks take {position - start} bytes, found {end - start}", hint=_DAMAGED
        )
    return SafetensorsFile(file, tensors, header.metadata)
