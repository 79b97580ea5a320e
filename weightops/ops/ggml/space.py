"""A thread's memory for what it works out on the way: fresh pages cost more than most passes over old ones."""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]

PART = 1 << 17
"""Elements that a thread quantises at once: few enough for its caches, and enough for calls to cost little beside what
they do, and for threads to wait little for the interpreter's lock."""
NBYTES = 16 * 4 * PART
"""What a thread needs at once: arrays of a part, those that are kept and those of the moment."""


class Space(threading.local):
    """Arrays by name. What is taken again under a name is the same memory."""

    def __init__(self) -> None:
        self._memory: dict[str, Floats] = {}

    def floats(self, name: str, *shape: int) -> Floats:
        """An array of this shape, whatever is in it."""
        import numpy as np

        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            memory = self._memory[name] = np.empty(size, np.float32)
        return memory[:size].reshape(shape)


@cache
def space() -> Space:
    """The one of the process, which is another in each thread."""
    return Space()
