"""How much of a phase is done, how fast it goes, and how long it will take; and numbers as people read them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_WINDOW_S = 60.0
"""The rate is that of so long ago until now: a server that has become slow shows within a minute."""
_STEP_S = 1.0


def human(nbytes: float) -> str:
    """Bytes for reading, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def duration(seconds: float) -> str:
    """A time for reading: `40 s`, `4 min`, `1 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent(error: float) -> str:
    """A share of one, for reading."""
    return f"{100 * error:.3g} %"


class Meter:
    """Counts the bytes of a phase. Those of files that were there before are done, and say nothing of the speed."""

    def __init__(self, phase: str, total_nbytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase, self.total_nbytes = phase, total_nbytes or None
        self.nbytes = 0
        self._skipped_nbytes = 0
        self._clock = clock
        self._started_s = clock()
        self._samples = deque([(self._started_s, 0)])
        self._begun: set[str] = set()

    def add(self, nbytes: int) -> None:
        """So many more are done; below zero, fewer."""
        self.nbytes += nbytes
        now_s = self._clock()
        if now_s - self._samples[-1][0] >= _STEP_S:
            self._samples.append((now_s, self.nbytes - self._skipped_nbytes))
            while now_s - self._samples[0][0] > _WINDOW_S:
                self._samples.popleft()

    def begin_file(self, name: str, done_nbytes: int) -> None:
        """A file is begun, of which so much was done before."""
        self._begun.add(name)
        self._skipped_nbytes += done_nbytes
        self.add(done_nbytes)

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        """A file is finished; if it is resumed, and was not begun, its bytes have just been counted."""
        if resumed and name not in self._begun:
            self._skipped_nbytes += nbytes

    @property
    def elapsed_s(self) -> float:
        """Seconds since the phase began."""
        return self._clock() - self._started_s

    @property
    def nbytes_per_s(self) -> float | None:
        """The rate of the last minute; None before there is one."""
        since_s, before = self._samples[0]
        passed_s = self._clock() - since_s
        return max(0.0, self.nbytes - self._skipped_nbytes - before) / passed_s if passed_s > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds until the phase is over at this rate; None if that cannot be said."""
        rate = self.nbytes_per_s
        if not rate or self.total_nbytes is None:
            return None
        return max(0, self.total_nbytes - self.nbytes) / rate
