"""Progress for people, on stderr: bars on a terminal; elsewhere a line per file, and one every half minute."""

from __future__ import annotations

import shutil
import sys
import threading
from typing import Any, Literal

import click

from weightops.cli.events import EventProgress
from weightops.cli.meter import Meter, duration, human
from weightops.engine.control import Progress, Silent
from weightops.io.escape import escape

How = Literal["auto", "plain", "json", "none"]
HOWS: tuple[How, ...] = ("auto", "plain", "json", "none")
_HEARTBEAT_S = 30.0
"""How long there may be nothing to read where there is no terminal: some that watch logs take silence for death."""
_MAX_NAME = 28


def make_progress(how: How) -> Progress:
    """Progress as it was asked for; `auto` shows bars on a terminal, and lines elsewhere."""
    if how == "auto":
        return BarProgress() if sys.stderr.isatty() else LineProgress()
    kinds: dict[How, type[Progress]] = {"plain": LineProgress, "json": EventProgress, "none": Silent}
    return kinds[how]()


class BarProgress:
    """A bar for the whole and one for each file in work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar: Any = None
        self._files: dict[str, Any] = {}
        self._resumed_nbytes = 0

    def start(self, what: str, total_nbytes: int) -> None:
        self._resumed_nbytes = 0
        self._bar = self._new_bar(what, total_nbytes, 0)

    def _new_bar(self, what: str, total_nbytes: int, done_nbytes: int) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=total_nbytes or None,
            initial=done_nbytes,
            desc=what,
            unit="B",
            unit_scale=True,
            # Room for the ^C that a terminal echoes: wrapped, it would leave the bars standing.
            ncols=shutil.get_terminal_size().columns - 3,
            mininterval=0.2,
            leave=False,
        )

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None:
        with self._lock:
            if self._bar is None:
                return
            self._files[name] = self._new_bar(f"  {_short(name)}", nbytes, done_nbytes)
            if done_nbytes:
                # What was there already has cost no time: it must not count into the rate.
                for counter in ("n", "initial", "last_print_n"):
                    setattr(self._bar, counter, getattr(self._bar, counter) + done_nbytes)
                self._resumed_nbytes += done_nbytes
                self._bar.set_postfix_str(f"{human(self._resumed_nbytes)} resumed")

    def advance(self, nbytes: int, name: str = "") -> None:
        with self._lock:
            if self._bar is None:
                return
            self._bar.update(nbytes)
            if name in self._files:
                self._files[name].update(nbytes)

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        with self._lock:
            bar = self._files.pop(name, None)
            if bar is not None:
                bar.close()
            self._say(_finished(name, nbytes, resumed))

    def note(self, text: str) -> None:
        self._say(text)

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            click.echo(line, err=True)

    def stop(self) -> None:
        with self._lock:
            bars = [*reversed(self._files.values()), self._bar] if self._bar is not None else []
            self._bar, self._files = None, {}
        for bar in bars:
            bar.close()


class LineProgress:
    """A line for each finished file, and every half minute one that says how far it is, whether it moves or not."""

    def __init__(self, interval_s: float = _HEARTBEAT_S) -> None:
        self._lock = threading.Lock()
        self._interval_s = interval_s
        self._meter: Meter | None = None
        self._over = threading.Event()

    def start(self, what: str, total_nbytes: int) -> None:
        self.stop()
        self._meter, self._over = Meter(what, total_nbytes), threading.Event()
        threading.Thread(target=self._beat, args=(self._over,), daemon=True).start()

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(self._interval_s):
            self.tell()

    def tell(self) -> None:
        """Say how far it is."""
        with self._lock:
            if self._meter is not None:
                click.echo(how_far(self._meter), err=True)

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None:
        with self._lock:
            if self._meter is not None:
                self._meter.begin_file(name, done_nbytes)

    def advance(self, nbytes: int, name: str = "") -> None:
        with self._lock:
            if self._meter is not None:
                self._meter.add(nbytes)

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        with self._lock:
            if self._meter is not None:
                self._meter.finish_file(name, nbytes, resumed)
            click.echo(_finished(name, nbytes, resumed), err=True)

    def note(self, text: str) -> None:
        with self._lock:
            click.echo(text, err=True)

    def stop(self) -> None:
        self._over.set()
        with self._lock:
            self._meter = None


def how_far(meter: Meter) -> str:
    """A phase in one line: `writing: 42 %, 3.2 GB of 7.6 GB, 1.1 GB/s, 4 min left`."""
    done, total, rate, eta_s = meter.nbytes, meter.total_nbytes, meter.nbytes_per_s, meter.eta_s
    parts = [f"{100 * done // total} %, {human(done)} of {human(total)}" if total else human(done)]
    parts += [f"{human(rate)}/s"] if rate is not None else []
    parts += [f"{duration(eta_s)} left"] if eta_s is not None else []
    return f"{meter.phase}: {', '.join(parts)}"


def _finished(name: str, nbytes: int, resumed: bool) -> str:
    return f"{'kept' if resumed else 'wrote'} {escape(name)} ({human(nbytes)})"


def _short(name: str) -> str:
    """The end of a name, which tells shards apart, in a fixed width."""
    shown = escape(name)
    return (shown if len(shown) <= _MAX_NAME else "…" + shown[1 - _MAX_NAME :]).ljust(_MAX_NAME)
