"""Tensors that lie compressed in files, in blocks that can each be read alone."""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import accumulate

from weightops.errors import CorruptInput
from weightops.io.memory import copy_bytes
from weightops.io.source_file import SourceFile
from weightops.io.threads import together
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.byte_planes import BLOCK_NBYTES, decode, unpack_lengths
from weightops.spec import DType, TensorSpec

_TOGETHER = 8
"""Blocks that are in memory at once: more than the engine asks for."""


class Compressed(Op, frozen=True):
    """A tensor in coded blocks, one after the other from `offset` of a file.

    `lengths` are the bytes that each takes, as unsigned 32-bit little-endian integers, none above what it holds.
    Any range can be asked for: the block of which only the beginning was wanted is kept for who wants the rest.
    """

    file: SourceFile
    offset: int
    dtype: DType
    shape: tuple[int, ...]
    lengths: bytes

    @property
    def source(self) -> SourceFile:
        return self.file

    @property
    def extent(self) -> tuple[int, int]:
        return self.offset, self.offset + _ends(self.lengths)[-1]

    @property
    def scratch_nbytes(self) -> int:
        return (_TOGETHER + 2) * BLOCK_NBYTES  # coded blocks, the planes of one, and the block that is kept

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        kept: _Kept = read.running.setdefault(Compressed, _Kept())
        number, inside = divmod(start, BLOCK_NBYTES)
        if inside:
            block = memoryview(kept.memory)[: tensor.nbytes - number * BLOCK_NBYTES]
            if (kept.tensor, kept.number) != (tensor, number):
                kept.tensor = None  # until it holds what it is to hold
                self._decode(number, [block], read)
                kept.tensor, kept.number = tensor, number
            part = block[inside : inside + len(out)]
            copy_bytes(out[: len(part)], part)
            out = out[len(part) :]
            number += 1
        while out:
            blocks = [out[i : i + BLOCK_NBYTES] for i in range(0, len(out), BLOCK_NBYTES)][:_TOGETHER]
            out = out[sum(map(len, blocks)) :]
            last, wanted = number + len(blocks) - 1, blocks[-1]
            nbytes = min(BLOCK_NBYTES, tensor.nbytes - last * BLOCK_NBYTES)
            if len(wanted) < nbytes:
                kept.tensor = None
                blocks[-1] = memoryview(kept.memory)[:nbytes]
            self._decode(number, blocks, read)
            if len(wanted) < nbytes:
                kept.tensor, kept.number = tensor, last
                copy_bytes(wanted, blocks[-1][: len(wanted)])
            number = last + 1

    def _decode(self, first: int, blocks: list[memoryview], read: Evaluator) -> None:
        """Fill `blocks`, the first of which has the number `first`."""
        ends = _ends(self.lengths)[first : first + len(blocks) + 1]
        begin, nbytes = ends[0], ends[-1] - ends[0]
        with read.scratch(nbytes) as coded:
            read.files.read_into(self.file, self.offset + begin, coded, _ends(self.lengths)[-1] - ends[-1])
            jobs = [
                partial(self._decode_one, self.offset + ends[i], coded[ends[i] - begin : ends[i + 1] - begin], block)
                for i, block in enumerate(blocks)
            ]
            together(jobs, read.threads)

    def _decode_one(self, offset: int, coded: memoryview, out: memoryview) -> None:
        try:
            decode(coded, out, self.dtype.itemsize)
        except ValueError as error:
            raise CorruptInput(
                f"{self.file.shown}: the {len(coded)} bytes at {offset} are no block of a compressed delta: {error}",
                hint="the file was damaged after it was written: fetch it again",
            ) from None


class _Kept:
    """The block that was decoded last for a part of it: whose it is, its number, and its bytes."""

    def __init__(self) -> None:
        self.tensor: LazyTensor | None = None
        self.number = 0
        self.memory = bytearray(BLOCK_NBYTES)


@lru_cache(maxsize=256)
def _ends(lengths: bytes) -> tuple[int, ...]:
    """Where blocks of such lengths begin, and where the last ends."""
    return (0, *accumulate(unpack_lengths(lengths)))
