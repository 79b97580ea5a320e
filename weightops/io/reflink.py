"""Sharing blocks between files: what does not change of a file need not be written again.

Btrfs, XFS, bcachefs, OCFS2 and some network file systems let two files own the same blocks until one of them is
written to (FICLONERANGE of Linux, see ioctl_ficlonerange(2)). It takes whole blocks only: a range can be shared if it
lies equally far from a block's beginning in both files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from weightops.io.paths import open_regular
from weightops.io.platform.files import clone_range
from weightops.io.source_file import SourceFile

BLOCK_NBYTES = 4096
"""The block size of nearly every file system; where it is larger, what does not fit is refused, and written."""
MIN_SHARED_NBYTES = 256 << 10
"""Less is written: the request, and the writes around it that it cuts short, would cost about as much."""
_HEADER_ALIGNMENT = 8


class Extent(NamedTuple):
    """`nbytes` bytes that lie at `source_offset` in one file, and are wanted at `target_offset` of another."""

    source_offset: int
    target_offset: int
    nbytes: int


def shareable(extents: Iterable[Extent], source_nbytes: int, block_nbytes: int = BLOCK_NBYTES) -> list[Extent]:
    """The whole blocks in the extents of one source file of `source_nbytes`, in the order of the target.

    Extents that follow one another in both files count as one, so that tensors may begin and end in the middle of
    blocks. Nothing of an extent can be shared that lies at other distances from the blocks of the two files. The last
    block of the source may be cut short if the target ends there, too, which the caller knows: it is left out here.
    """
    found = []
    for source_offset, target_offset, nbytes in _joined(extents):
        if (source_offset - target_offset) % block_nbytes:
            continue
        skipped = -target_offset % block_nbytes
        stop = min(source_offset + nbytes, source_nbytes) // block_nbytes * block_nbytes
        if stop > source_offset + skipped:
            found.append(Extent(source_offset + skipped, target_offset + skipped, stop - source_offset - skipped))
    return found


def _joined(extents: Iterable[Extent]) -> list[Extent]:
    joined: list[Extent] = []
    for extent in sorted((e for e in extents if e.nbytes), key=lambda e: e.target_offset):
        last = joined[-1] if joined else Extent(0, 0, 0)
        follows = extent.target_offset - last.target_offset == extent.source_offset - last.source_offset == last.nbytes
        if joined and follows:
            joined[-1] = last._replace(nbytes=last.nbytes + extent.nbytes)
        else:
            joined.append(extent)
    return joined


def header_padding(header_nbytes: int, data_offset: int, block_nbytes: int = BLOCK_NBYTES) -> int:
    """How many spaces to put behind a header of `header_nbytes` bytes, for the data to lie as in the source.

    There it began at `data_offset`; behind the padding it begins equally far from a block's beginning. A safetensors
    header may end in spaces, but `save_file` pads to 8 bytes only: such a file differs from its own in those spaces.
    """
    return (data_offset - header_nbytes) % block_nbytes


def fit_header(
    header_nbytes: int,
    extents: Mapping[SourceFile, Sequence[Extent]],
    block_nbytes: int = BLOCK_NBYTES,
    min_nbytes: int = MIN_SHARED_NBYTES,
) -> tuple[int, dict[SourceFile, list[Extent]]]:
    """How many spaces to put behind a header for most of what follows to be shareable, and what then is, by source.

    In `extents` the target's offsets count from the header's end, in the result from the beginning of the file. A
    header that ends at a multiple of 8 bytes still does, for readers may rely on it. Of several numbers that share as
    much it is the least: 0 if nothing can be shared. Ranges below `min_nbytes` are left out.
    """
    found: dict[int, dict[SourceFile, list[Extent]]] = {}
    for source, own in extents.items():
        for extent in _joined(own):
            padding = header_padding(header_nbytes, extent.source_offset - extent.target_offset, block_nbytes)
            if padding % _HEADER_ALIGNMENT:
                continue
            placed = extent._replace(target_offset=header_nbytes + padding + extent.target_offset)
            for whole in shareable([placed], source.nbytes, block_nbytes):
                if whole.nbytes >= min_nbytes:
                    found.setdefault(padding, {}).setdefault(source, []).append(whole)
    gains = {padding: sum(e.nbytes for own in by.values() for e in own) for padding, by in found.items()}
    best = min(gains, key=lambda padding: (-gains[padding], padding), default=0)
    return best, found.get(best, {})


def share(source: SourceFile, extents: Iterable[Extent], target_fd: int) -> list[Extent]:
    """Let the target share these ranges with a source on this machine; those of them that it now does.

    None of them if the file is no longer what it was, as reading it will show. Raises as `open_regular` and
    `clone_range` do.
    """
    fd = open_regular(Path(source.path))
    try:
        if SourceFile.of(Path(source.path), fd) != source:
            return []
        return [e for e in extents if clone_range(fd, e.source_offset, target_fd, e.target_offset, e.nbytes)]
    finally:
        os.close(fd)
