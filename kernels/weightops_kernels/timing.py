"""Time of a GPU function as a captured CUDA graph, with the L2 cache flushed before every run."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

FLUSH_NBYTES = 256 << 20
"""More than twice the L2 cache of any GPU so far."""


def time_us(function: Callable[[], object], runs: int = 30) -> float:
    """Median microseconds of one call. A graph leaves out what Python and the driver take to launch.

    A graph of the flush alone is timed too and taken off, since events cannot stand inside a graph.
    """
    flush = torch.empty(FLUSH_NBYTES, dtype=torch.int8, device="cuda")
    alone = _graph(flush.zero_)
    both = _graph(lambda: (flush.zero_(), function()))
    return _median_us(both, runs) - _median_us(alone, runs)


def copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes read and written in a second by a copy between two buffers on the device."""
    source = torch.empty(nbytes, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / (time_us(lambda: target.copy_(source)) * 1e-6)


def _graph(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    # torch has no types here
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def _median_us(graph: torch.cuda.CUDAGraph, runs: int) -> float:
    times = []
    for _ in range(runs):
        # torch has no types here
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return float(statistics.median(times))
