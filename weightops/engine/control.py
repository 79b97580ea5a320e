"""How a run talks to its surroundings: progress out, a request to stop in."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

from weightops.errors import Interrupted
from weightops.lazy import Once
from weightops.stores.stores import Stores

if TYPE_CHECKING:
    from weightops.stores.web.web import Web


_SIGTERM = 15


class Progress(Protocol):
    """Told what is going on, from any thread."""

    def start(self, what: str, total_nbytes: int) -> None:
        """A phase begins that will move this many bytes."""

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None:
        """A file of the phase is begun, of which so much is done."""

    def advance(self, nbytes: int, name: str = "") -> None:
        """So many more bytes of the phase are done, of this file if it is named; below zero, fewer."""

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None:
        """A file is committed, now or (resumed) by an earlier run."""

    def note(self, text: str) -> None:
        """Something that a waiting person would want to know."""

    def stop(self) -> None:
        """The phase is over."""


class Silent:
    """Progress for nobody."""

    def start(self, what: str, total_nbytes: int) -> None: ...

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None: ...

    def advance(self, nbytes: int, name: str = "") -> None: ...

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


class Control:
    """Progress, the places that are read from, checks done once, and a way to stop.

    `web` are connections to servers that are open already; `stores` makes its own. After `time_limit_s` it stops as by
    SIGTERM. `cancel` may be called from a signal handler or another thread.
    """

    def __init__(
        self,
        progress: Progress | None = None,
        *,
        parent: Control | None = None,
        web: Web | None = None,
        stores: Stores | None = None,
        time_limit_s: float | None = None,
    ) -> None:
        self.progress: Progress = progress or (parent.progress if parent else Silent())
        self.stores: Stores = stores or (parent.stores if parent and web is None else Stores(web))
        self.once: Once = parent.once if parent else Once()
        self._parent = parent
        self._stop = threading.Event()
        self._signal = 2
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s

    def cancel(self, signal_number: int = 2) -> None:
        """Ask everything that runs under this control to stop, as the signal would."""
        self._signal = signal_number
        self._stop.set()
        self.stores.interrupt(Interrupted(signal_number))

    def stop(self) -> None:
        """Ask what runs under this control alone to stop, at its next check; connections, which others use, stay."""
        self._stop.set()

    def check(self) -> None:
        """Raise `Interrupted` once this control or its parent was cancelled; to be called between blocks of work."""
        if self._parent is not None:
            self._parent.check()
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.cancel(_SIGTERM)
        if self._stop.is_set():
            raise Interrupted(self._signal)
