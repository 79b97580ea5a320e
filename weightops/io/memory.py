"""Copies within memory."""

from __future__ import annotations

_MUCH_NBYTES = 1 << 16


def copy_bytes(out: memoryview, data: memoryview | bytearray) -> None:
    """`out[:] = data`; of much, other threads may run meanwhile, which Python's own copy does not let them."""
    if len(data) < _MUCH_NBYTES:
        out[:] = data
        return
    import numpy as np

    np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(data, np.uint8))
