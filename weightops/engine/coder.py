"""Tensors on their way into coded blocks, and what is known of them when the last has been made."""

from __future__ import annotations

from functools import partial
from typing import Any

import xxhash

from weightops.formats.layout import Coded
from weightops.io.threads import together


class Coder:
    """Cuts the tensors of one file into blocks, as they come, and codes each.

    `lengths` are the bytes of the coded blocks so far, `digests` the xxh3_128 of the tensors that have ended: of what
    they hold, not of how it is put down.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.digests: dict[str, str] = {}
        self._hasher: Any = None
        self._begun = bytearray()

    def blocks(self, piece: Coded, start: int, data: memoryview, threads: int) -> list[bytes | memoryview]:
        """The coded blocks that end within `data`, the bytes of a tensor from `start`."""
        if start == 0:
            self._hasher = xxhash.xxh3_128()
        self._hasher.update(data)
        is_end = start + len(data) == piece.nbytes
        if is_end:
            self.digests[piece.name] = self._hasher.hexdigest()
        whole: list[memoryview] = []
        if self._begun:
            missing = piece.block_nbytes - len(self._begun)
            self._begun += data[:missing]
            data = data[missing:]
            if len(self._begun) < piece.block_nbytes and not is_end:
                return []
            whole, self._begun = [memoryview(self._begun)], bytearray()
        while len(data) >= piece.block_nbytes or (data and is_end):
            whole.append(data[: piece.block_nbytes])
            data = data[piece.block_nbytes :]
        self._begun += data
        coded = together([partial(piece.code, block) for block in whole], threads)
        self.lengths += map(len, coded)
        return coded
