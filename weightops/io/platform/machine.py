"""The machine and its processes: cores, memory, who runs.

Linux says all of it in small files, which takes a hundredth of the time of importing psutil; elsewhere psutil asks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from weightops.io.platform.optional import module

T = TypeVar("T")

PROC = Path("/proc")
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}
"""How /proc/self/mountinfo writes what would end a field."""
_HAS_AFFINITY = hasattr(os, "sched_getaffinity")
_resource = module("resource")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's names for `mallopt`."""


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 1


def once_per_process(make: Callable[[], T]) -> Callable[[], T]:
    """As `functools.cache`, for what a fork does not take along: threads, of which the child would wait for work."""
    found = cache(lambda process: make())
    return wraps(make)(lambda: found(os.getpid()))


def page_memory(nbytes: int) -> mmap.mmap:
    """Anonymous memory that begins at a page, as direct writes need; it counts as this process's own."""
    private = getattr(mmap, "MAP_PRIVATE", None)
    if private is None:
        return mmap.mmap(-1, nbytes)
    return mmap.mmap(-1, nbytes, flags=private | mmap.MAP_ANONYMOUS)


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, the cgroup's or its own limit, whichever is least."""
    candidates = [_free_memory()]
    for path in CGROUPS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            candidates.append(int(text))
    for kind in (_resource.RLIMIT_DATA, _resource.RLIMIT_AS) if _resource else ():
        soft, _ = _resource.getrlimit(kind)
        if soft != _resource.RLIM_INFINITY:
            candidates.append(soft)
    return min(candidates)


def _free_memory() -> int:
    for line in (_proc("meminfo") or b"").splitlines():
        if line.startswith(b"MemAvailable:"):
            return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.virtual_memory().available)


def release_freed() -> None:
    """Give memory that is free in between back to the system, where the C library is glibc.

    What was freed between what is kept stays with the process otherwise: up to a third of a model that is loaded layer
    by layer, and tens of megabytes for each block that is quantised.
    """
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)


def reuse_freed(nbytes: int) -> None:
    """Have what is freed used again, up to `nbytes` in one piece, where the C library is glibc.

    It gives larger pieces back to the system at once otherwise, and each page of the next is a fault: half the time of
    arithmetic on blocks.
    """
    mallopt = c_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, nbytes)
        mallopt(_M_TRIM_THRESHOLD, 4 * nbytes)


def c_function(name: str) -> Any:
    """A function of the C library, which sets `ctypes.get_errno`; None where there is none of that name."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name, None)
    except (OSError, TypeError):  # Windows has no library of all that a program has loaded
        return None


def boot_id() -> str:
    """A name for the time since this machine was started; empty where the system gives none."""
    return (_proc("sys/kernel/random/boot_id") or b"").decode("ascii", "replace").strip()


def pid_namespace() -> str:
    """A name for what the numbers of processes mean something in: containers number theirs apart. Empty elsewhere."""
    try:
        return os.readlink(PROC / "self/ns/pid")
    except OSError:
        return ""


HIDDEN = -1
"""What `started` says of a process that lives, and of which this one may know no more."""


def started(pid: int) -> int | None:
    """When a process started, by a clock of its system's own; None if it is gone (a zombie counts as gone).

    It tells a process from a later one of the same number.
    """
    stat = _proc(f"{pid}/stat")
    if stat is not None:
        fields = stat.rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    if _proc("self/stat") is not None:
        return HIDDEN if _is_hidden(pid) else None
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time() * 1000)
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return None
    except psutil.AccessDenied:
        return HIDDEN


def _is_hidden(pid: int) -> bool:
    """Whether a process that is not in /proc is there all the same, as others' are with the mount option hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        pass
    return False


def _proc(name: str) -> bytes | None:
    try:
        return (PROC / name).read_bytes()
    except OSError:
        return None


def total_memory() -> int | None:
    """Bytes of memory that the machine has; None where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def file_system_type(folder: Path) -> str | None:
    """The type of the file system that a folder is on, as Linux has it."""
    try:
        lines = (PROC / "self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    return find_mount(lines, folder.resolve())


def find_mount(lines: list[str], folder: Path) -> str | None:
    """The type of the innermost mount, the last of several, that a line of mountinfo(5) says a folder lies in."""
    best: tuple[int, str | None] = (-1, None)
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4]
        for escaped, character in _ESCAPES.items():
            point = point.replace(escaped, character)
        if folder.is_relative_to(point) and len(Path(point).parts) >= best[0]:
            best = len(Path(point).parts), after.split(" ")[0]
    return best[1]
