"""A program that is timed: wall and processor seconds, and the most of its anonymous memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Side:
    """Of each run of one of the contestants: wall and processor seconds, and the most of anonymous memory in MB."""

    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    rss_anon_mb: list[float] = field(default_factory=list)

    def run(self, arguments: Sequence[str]) -> None:
        """Run to the end, and until what was written is on disk."""
        before, start, peak = os.times(), time.perf_counter(), 0
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                line = next(li for li in status.read_text(encoding="utf-8").splitlines() if li.startswith("RssAnon:"))
                peak = max(peak, int(line.split()[1]))
            except (OSError, StopIteration):
                pass
            time.sleep(0.02)
        os.sync()
        self.wall_s.append(time.perf_counter() - start)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        self.processor_s.append(used)
        self.rss_anon_mb.append(peak / 1000)
        if process.returncode:
            assert process.stderr is not None
            raise SystemExit(f"{' '.join(arguments)} failed:\n{process.stderr.read().decode()[-2000:]}")
