"""Run one weightops command again and again, killed at its first, second, third, ... change to the disk.

    python killer.py FOLDER OUT ARGUMENTS...

After each kill the same command runs undisturbed; what it leaves is held against the output of a run that was
never killed. Prints JSON: how many changes a whole run makes, and after which kills the result differed.
A process is forked for each run, so that nothing is imported twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightops.cli.main import run
from weightops.ops import libtorch

CHANGES = ("mkdir", "open", "write", "pwrite", "posix_fallocate", "ftruncate", "fsync", "replace", "rename", "unlink")


def arm(fatal: int) -> None:
    """From now on the `fatal`-th change to the disk is this process's last; a write gets half-way."""
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


def forked(arguments: list[str], fatal: int | None) -> int:
    """Exit code of a run in a child, negative when it was killed."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        if fatal is not None:
            arm(fatal)
        os._exit(run(arguments))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def state(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def main() -> None:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    libtorch._library()
    shutil.rmtree(out, ignore_errors=True)
    assert forked(arguments, None) == 0
    reference = state(out)
    shutil.rmtree(out)
    wrong = []
    kills = 0
    while True:
        if "--overwrite" in arguments:
            out.mkdir()
            (out / "old").write_text("old")
        if forked(arguments, kills + 1) != -signal.SIGKILL:
            break
        kills += 1
        lost = "--overwrite" in arguments and not (out.exists() or any(out.parent.glob(f"{out.name}.*replaced")))
        again = forked(arguments, None)
        left = list(out.parent.glob(f"{out.name}.*"))
        # A run killed after the output got its name is finished: the next one says that the output exists.
        if again not in (0, 11) or state(out) != reference or left or lost:
            wrong.append([kills, again, lost, [path.name for path in left]])
        for path in (out, *left):
            shutil.rmtree(path, ignore_errors=True)
    print(json.dumps({"kills": kills, "wrong": wrong, "files": len(reference)}))


main()
