"""Hidden states of all windows between blocks: in memory, or in a mapped file where memory does not suffice."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from weightops.errors import NoRoom
from weightops.io.escape import escape
from weightops.io.platform.files import fill


@contextmanager
def hidden_states(
    shape: tuple[int, int, int], dtype: torch.dtype, *, in_memory: bool, folder: Path | None = None
) -> Iterator[torch.Tensor]:
    """Room for `[windows, tokens, hidden]`, for the length of a `with` block.

    Not `in_memory`, it is a file without a name in `folder` (that of temporary files by default), whose pages the
    system writes back when it needs memory. All of it is allocated at once: a disk that fills up later would kill the
    process. Raises `NoRoom` where the disk does not suffice.
    """
    if in_memory:
        yield torch.empty(shape, dtype=dtype)
        return
    nbytes = math.prod(shape) * dtype.itemsize
    place = folder or Path(tempfile.gettempdir())
    with tempfile.TemporaryFile(dir=place) as file:
        try:
            fill(file.fileno(), nbytes)
        except OSError as error:
            raise NoRoom(
                f"{escape(str(place))}: hidden states of {nbytes / 1e9:.1f} GB do not fit: {error.strerror}",
                hint="give less --text, a larger --max-memory, or set TMPDIR to a folder with more room",
            ) from error
        mapped = np.memmap(file, np.uint8, "r+", shape=(nbytes,))
        yield torch.from_numpy(mapped).view(dtype).view(shape)
