"""A program in a real terminal of a given size: keys in, and everything that it wrote out."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_terminals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
CONTROLS = re.compile(
    r"\x1b\[[0-9;?<>=]*[a-zA-Z]|\x1b[=>()][A-Z0-9]?|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1bP[^\x1b]*\x1b\\"
)


@dataclass
class Shown:
    """How it ended, all that came to the terminal, and the same without what moves the cursor."""

    code: int
    raw: str
    echoes: bool

    @property
    def text(self) -> str:
        return CONTROLS.sub("", self.raw).replace("\r", "")


def run_in_terminal(
    arguments: Sequence[str],
    columns: int,
    rows: int,
    *,
    steps: Sequence[tuple[str, str | int]] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    limit_s: float = 60,
) -> Shown:
    """Run `weightops` with these arguments. Each step waits for a text, and then sends keys, or a signal."""
    import fcntl
    import pty
    import select
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {n: v for n, v in os.environ.items() if n not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", **(env or {})}
    process = subprocess.Popen(
        [sys.executable, "-m", "weightops", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=environment,
        start_new_session=True,
    )
    received, left, begun = "", list(steps), time.monotonic()
    done: Callable[[], bool] = lambda: process.poll() is not None  # noqa: E731
    try:
        while True:
            is_over = done()
            while select.select([ours], [], [], 0 if is_over else 0.05)[0]:
                received += os.read(ours, 1 << 16).decode("utf-8", "replace")
            if is_over:
                break
            if left and left[0][0] in CONTROLS.sub("", received):
                _, sent = left.pop(0)
                if isinstance(sent, int):
                    process.send_signal(sent)
                else:
                    os.write(ours, sent.encode())
            assert time.monotonic() - begun < limit_s, CONTROLS.sub("", received)[-2000:]
        echoes = bool(termios.tcgetattr(theirs)[3] & termios.ECHO)
        return Shown(process.returncode, received, echoes)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)
        os.close(theirs)
