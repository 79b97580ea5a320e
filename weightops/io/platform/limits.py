"""Bounds on what this process may take, where the system has such."""

from __future__ import annotations

from weightops.io.platform.optional import module

_resource = module("resource")


def limit_process(cpu_s: int, nbytes: int) -> None:
    """Let this process, which cannot undo it, use no more processor time and address space than this."""
    if _resource is None:
        return
    for kind, limit in ((_resource.RLIMIT_CPU, cpu_s), (_resource.RLIMIT_AS, nbytes)):
        _, hard = _resource.getrlimit(kind)
        if hard == _resource.RLIM_INFINITY or hard > limit:
            _resource.setrlimit(kind, (limit, limit))
