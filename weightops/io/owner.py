"""Who holds something on disk: a process, named so that another one can tell whether it still lives."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from typing import Self

from weightops.io.platform.machine import HIDDEN, boot_id, pid_namespace, started

_NAME = re.compile(r"([0-9a-f]{12})-(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Owner:
    """A process: `place` is the running system that its number means something on, `started` tells reused ones apart.

    A system here is a boot of a host, as seen from one pid namespace: containers number their processes apart.
    """

    place: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.place}-{self.pid}-{self.started}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The owner that `str` wrote, or None."""
        match = _NAME.fullmatch(text)
        return cls(match[1], int(match[2]), int(match[3])) if match else None

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(_place(), os.getpid(), started(os.getpid()) or 0)

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None if it is (or was) on a system that cannot be asked."""
        if self.place != _place():
            return None
        return started(self.pid) in (self.started, HIDDEN)


@cache
def _place() -> str:
    parts = (platform.node(), boot_id(), pid_namespace())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
