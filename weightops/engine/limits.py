"""Memory: what a plan needs at most."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from weightops.engine.joint import group
from weightops.engine.stream import BLOCK_NBYTES, slots
from weightops.lazy import LazyTensor
from weightops.plan import Plan

_BASE_NBYTES = 200 << 20
"""The interpreter with torch loaded."""
_TRANSFORMERS_NBYTES = 200 << 20
"""transformers beside it, where an operation asked it what a model is like."""


def peak_memory(plans: Sequence[Plan], workers: int) -> int:
    """Anonymous memory in bytes that a run needs at most, whatever the size of the tensors."""
    groups = group([[shard.tensors.values() for shard in plan.shards] for plan in plans])
    scratch = sum(max((_scratch(tensor) for _, tensor in plan.tensors), default=0) for plan in plans)
    base = _BASE_NBYTES + (_TRANSFORMERS_NBYTES if "transformers" in sys.modules else 0)
    return base + workers * (slots(max(map(len, groups), default=1)) * BLOCK_NBYTES + scratch)


def _scratch(tensor: LazyTensor) -> int:
    """Buffers in use at once: one block per op on the way to the deepest file range."""
    block = max(BLOCK_NBYTES, tensor.grain)
    deepest = max(map(_scratch, tensor.inputs), default=0)
    return tensor.op.scratch_nbytes + deepest + (block if len(tensor.inputs) > 0 or tensor.grain > BLOCK_NBYTES else 0)
