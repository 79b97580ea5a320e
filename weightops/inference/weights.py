"""Lazy tensors into torch's memory, through our own reader."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from weightops.engine.control import Control
from weightops.engine.stream import BLOCK_NBYTES
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.elementwise import cast
from weightops.spec import DType

_MAX_THREADS = 8
_MUCH_NBYTES = 16 << 20
"""Less than this is read in this thread."""


def torch_dtype(dtype: DType) -> torch.dtype:
    """What torch calls an element type."""
    found = getattr(torch, dtype.value)
    assert isinstance(found, torch.dtype)
    return found


def own_dtype(dtype: torch.dtype) -> DType:
    """What we call an element type of torch."""
    return DType(str(dtype).removeprefix("torch."))


def read_all(wanted: Sequence[tuple[LazyTensor, torch.dtype]], device: str, control: Control) -> list[torch.Tensor]:
    """The values of tensors, each cast on its way into memory of its own; several are read at a time.

    Beside what it returns it takes a few blocks of 4 MiB, and one tensor where `device` is not the CPU.
    """
    tensors = [cast(tensor, own_dtype(dtype)) for tensor, dtype in wanted]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    threads = 1 if nbytes < _MUCH_NBYTES else min(len(tensors), os.cpu_count() or 1, _MAX_THREADS)
    results: list[torch.Tensor | None] = [None] * len(tensors)

    def read_some(positions: Sequence[int]) -> None:
        with Evaluator(control.stores, control.once) as read:
            for i in positions:
                results[i] = _read(tensors[i], read, control).to(device)

    # The largest first, dealt in turn, so that the threads end at about one time.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].nbytes)
    parts = [order[k::threads] for k in range(threads)]
    if threads == 1:
        read_some(order)
    else:
        with ThreadPoolExecutor(threads, "weights") as pool:
            list(pool.map(read_some, parts))
    return [result for result in results if result is not None]


def _read(tensor: LazyTensor, read: Evaluator, control: Control) -> torch.Tensor:
    out = torch.empty(tensor.spec.shape, dtype=torch_dtype(tensor.spec.dtype))
    data = out.reshape(-1).view(torch.uint8).numpy().data
    step = max(BLOCK_NBYTES // tensor.grain, 1) * tensor.grain if tensor.nbytes else 1
    for start in range(0, tensor.nbytes, step):
        control.check()
        read(tensor, start, data[start : start + step])
    return out
