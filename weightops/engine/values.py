"""The bytes of small tensors, before there is a plan; for operations that depend on values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from weightops.engine.control import Control
from weightops.engine.digest import in_threads
from weightops.lazy import Evaluator, LazyTensor

_NOTABLE_NBYTES = 64 << 20
"""Less than this is read without telling anybody, in this thread."""


def values(tensors: Sequence[LazyTensor], control: Control) -> list[bytes]:
    """The bytes of each tensor. Where much is to be read for them, several are computed at once, with progress."""
    costs = [sum(n.op.extent[1] - n.op.extent[0] for n in t.walk() if n.op.source is not None) for t in tensors]
    if sum(costs) < _NOTABLE_NBYTES:
        with Evaluator(control.stores, control.once) as read:
            return [read.whole(tensor) for tensor in tensors]
    found: list[bytes] = [b""] * len(tensors)

    def compute(i: int, control: Control) -> None:
        control.check()
        with Evaluator(control.stores, control.once) as read:
            found[i] = read.whole(tensors[i])
        control.progress.advance(costs[i])

    control.progress.start("measuring", sum(costs))
    in_threads(os.cpu_count() or 1, control, [partial(compute, i) for i in range(len(tensors))])
    control.progress.stop()
    return found
