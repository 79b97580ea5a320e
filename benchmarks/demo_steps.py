"""What the parts of the demo have in common: titles, commands, and a machine that dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from weightops.cli.main import run

_PROGRAM = Path(sys.executable).with_name("weightops")


def say(text: str) -> None:
    """A title."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def _show(arguments: tuple[str, ...], after: str = "") -> None:
    words = (f'"{word}"' if " " in word else word for word in arguments)
    print(f"$ weightops {' '.join(words)}{after}", flush=True)


def weightops(*arguments: str) -> None:
    """Show a command and run it: the program's own entry, in this process, where torch is loaded already."""
    _show(arguments)
    code = run(arguments)
    if code:
        raise SystemExit(code)


def output_of(*arguments: str) -> tuple[str, str]:
    """The same; returns what it says on stdout and stderr, for the caller to show."""
    _show(arguments)
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(arguments)
    if code:
        raise SystemExit(f"{err.getvalue()}exit code {code}")
    return out.getvalue(), err.getvalue()


def kill_when(is_half_done: Callable[[], bool], arguments: list[str]) -> None:
    """Start a command as a process of its own, and kill it without warning as soon as `is_half_done`."""
    _show(tuple(arguments), " &")
    process = subprocess.Popen([str(_PROGRAM), *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not is_half_done():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
