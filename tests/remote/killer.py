"""Run one `weightops download` again and again, killed at its first, second, third, ... change to the disk.

    python killer.py OUT BEFORE AFTER STEP

BEFORE and AFTER are revisions of org/model at HF_ENDPOINT; BEFORE is in OUT already each time, unless it is "-".
Of the changes, each STEP-th is tried.
After each kill nothing but files of the two revisions may stand under final names; then the same command runs
undisturbed, and in turn the one that goes back to BEFORE, and must leave what a run leaves that was never killed.
Prints JSON: how many kills there were, and what was wrong after which.
A process is forked for each run, so that nothing is imported twice.
"""

from __future__ import annotations

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

import httpx2  # noqa: F401
import huggingface_hub.hf_api  # noqa: F401

from weightops import api  # noqa: F401
from weightops.cli import download_command  # noqa: F401
from weightops.cli.main import run
from weightops.formats.manifest import NAME as FINAL
from weightops.remote import transfer
from weightops.remote.partial import STATE

CHANGES = ("mkdir", "open", "write", "pwrite", "posix_fallocate", "ftruncate", "fsync", "replace", "rename", "unlink")
CHANGES += ("rmdir", "utime")


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
                        half = len(args[1]) // 2
                        original(args[0], args[1][: half // 4096 * 4096 or half], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, wrap(name, getattr(os, name)))


def forked(out: Path, revision: str, fatal: int | None) -> int:
    """Exit code of a run in a child, negative when it was killed."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        if fatal is not None:
            arm(fatal)
        os._exit(run(["download", f"org/model@{revision}", "--out", str(out)]))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def state(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(out.rglob("*"))
    }


def listed(out: Path) -> Any:
    """The files in the manifest."""
    return json.loads((out / FINAL).read_bytes())["files"]


def named(out: Path) -> set[tuple[str, str]]:
    """What stands under final names, the manifest apart."""
    return {item for item in state(out).items() if not item[0].startswith((STATE, FINAL))}


def main() -> None:
    out, before, after = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    transfer._TICK_S = 0.005
    step = int(sys.argv[4])
    references, manifests = {}, {}
    for revision in {before, after} - {"-"}:
        assert forked(out, revision, None) == 0
        references[revision], manifests[revision] = state(out), listed(out)
        shutil.copytree(out, out.with_name(f"reference-{revision}"), copy_function=shutil.copy2)
        shutil.rmtree(out)
    allowed = {item for reference in references.values() for item in reference.items()}
    wrong: list[Any] = []
    kills = 0
    while True:
        if before != "-":
            shutil.copytree(out.with_name(f"reference-{before}"), out, copy_function=shutil.copy2)
        if forked(out, after, kills + 1) != -signal.SIGKILL:
            break
        kills += 1
        strange = named(out) - allowed if out.exists() else set()
        then = before if before != "-" and kills % 2 else after
        again = forked(out, then, None)
        left = state(out)
        missing = references[then].items() - left.items()
        # Files of the other revision may stay, as stale ones do; the manifest names them.
        strange |= {(name, digest) for name, digest in left.items() - allowed if name != FINAL}
        if again or strange or any(name != FINAL for name, _ in missing) or listed(out) != manifests[then]:
            wrong.append([kills, then, again, sorted(strange), sorted(missing)])
        shutil.rmtree(out)
        kills += step - 1
    print(json.dumps({"kills": kills, "wrong": wrong}))


main()
