"""How fast sources can be read, found by reading a little: what a dry run can honestly say of time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from weightops.io.platform.files import open_direct_to_read, read_at
from weightops.io.platform.machine import page_memory
from weightops.io.source_file import SourceFile

_BLOCK_NBYTES = 4 << 20
_LEAST_NBYTES = 64 << 20
"""Of smaller files reading takes no time worth speaking of."""
_LIMIT_S = 0.2


def read_rate(files: Iterable[SourceFile], clock: Callable[[], float] = time.monotonic) -> float | None:
    """Bytes per second at which the largest of the files was read just now, for a fifth of a second at most.

    It is read past the page cache, which may hold what lies there. None if it is on a server, or small, or on a file
    system where that cannot be done: then there is no rate to go by.
    """
    file = max(files, key=lambda file: file.nbytes, default=None)
    if file is None or file.is_remote or file.nbytes < _LEAST_NBYTES:
        return None
    try:
        fd = open_direct_to_read(Path(file.path))
    except OSError:
        return None
    try:
        with memoryview(page_memory(_BLOCK_NBYTES)) as block:
            # The middle: the beginning was read for its header, and lies in the caches of some disks.
            start = file.nbytes // 2 // _BLOCK_NBYTES * _BLOCK_NBYTES
            return _rate(fd, block, start, clock)
    except OSError:
        return None
    finally:
        os.close(fd)


def _rate(fd: int, block: memoryview, start: int, clock: Callable[[], float]) -> float | None:
    nbytes, began_s = 0, clock()
    while (passed_s := clock() - began_s) < _LIMIT_S:
        n = read_at(fd, block, start + nbytes)
        nbytes += n
        if n < _BLOCK_NBYTES:
            passed_s = clock() - began_s
            break
    return nbytes / passed_s if nbytes and passed_s > 0 else None
