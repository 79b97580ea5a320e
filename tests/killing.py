"""Killing a command at its n-th change to the disk.

A process is forked for each run, so that nothing is imported twice.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from weightops.cli.main import run

CHANGES = ("mkdir", "open", "write", "pwrite", "posix_fallocate", "ftruncate", "fsync", "replace", "rename", "unlink")
CHANGES += ("rmdir", "utime", "link")


def arm(fatal: int) -> None:
    """From now on the `fatal`-th change to the disk, by any thread, is this process's last; a write gets half-way."""
    lock = threading.Lock()
    count = 0

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return original(*args, **kwargs)
            with lock:
                count += 1
                if count == fatal:
                    if name in ("write", "pwrite"):
                        with contextlib.suppress(OSError):  # half a block may be too small for O_DIRECT
                            half = len(args[1]) // 2
                            original(args[0], args[1][: half // 4096 * 4096 or half], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, wrap(name, getattr(os, name)))


THEN = "then"
"""Between commands that follow one another."""


def run_all(arguments: Sequence[str]) -> int:
    """Exit code of the last of several commands, each of which runs whatever became of the one before."""
    words = [*arguments, THEN]
    code = 0
    while words:
        end = words.index(THEN)
        code = run(words[:end])
        words = words[end + 1 :]
    return code


def forked(arguments: Sequence[str], fatal: int | None) -> int:
    """Exit code of a command, or several, in a child; negative when it was killed at its `fatal`-th change.

    What the child has imported when it ends is imported here too, so that the next need not.
    """
    reading, writing = os.pipe()
    before = sys.modules.copy()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.fsync = lambda fd: None  # what a killed process has written is there: a change to count, not to wait for
        if fatal is not None:
            arm(fatal)
        code = run_all(arguments)
        with open(writing, "w") as file:
            file.write("\n".join(name for name in sys.modules if name not in before))
        os._exit(code)
    os.close(writing)
    with open(reading) as file:
        imported = file.read().split()
    _, status = os.waitpid(pid, 0)
    for name in imported:
        importlib.import_module(name)
    return os.waitstatus_to_exitcode(status)
