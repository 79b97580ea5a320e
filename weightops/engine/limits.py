"""Memory: what a plan needs at most, and what this process may have."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

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


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, the cgroup's or its own limit, whichever is least."""
    candidates = [_meminfo(), *_cgroup()]
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            candidates.append(soft)
    return min(candidates)


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup() -> list[int]:
    limits = []
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return limits


def release_freed() -> None:
    """Give memory that is free in between back to the system, where the C library is glibc.

    What was freed between what is kept stays with the process otherwise: up to a third of a model that is loaded layer
    by layer, and tens of megabytes for each block that is quantised.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
