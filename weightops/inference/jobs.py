"""Texts that are wanted of a pool: what is asked, how far it is, and the events for whoever asked."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from weightops.inference.events import Event, Failed, Finished, Waiting
from weightops.inference.opened import Placement
from weightops.inference.prompts import Prompt, Prompted
from weightops.inference.settings import Settings

Deliver = Callable[[Event], None]


@dataclass(frozen=True)
class Request:
    """A text that is wanted of a model, whose prompt may be tokens of its own already."""

    model: str
    prompt: Prompt | Prompted
    settings: Settings = field(default_factory=Settings)


@dataclass(eq=False)
class Job:
    """A request, how far it is, and where its events go."""

    request: Request
    column: int
    to: Deliver
    prompted: Prompted
    placement: Placement
    nbytes: int
    """What its cache and computing take."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    events: Iterator[Event] | None = None
    has_spoken: bool = False
    """Whether its first token has come."""
    said: str | None = None
    """Why it waits, as was said last."""

    def deliver(self, event: Event) -> None:
        """Give an event out; who cannot take it wants no more."""
        try:
            self.to(event)
        except Exception:
            self.cancelled.set()

    def wait(self, reason: Literal["queue", "memory", "loading"]) -> None:
        if self.said != reason:
            self.said = reason
            self.deliver(Waiting(column=self.column, reason=reason))


class Texts:
    """The events of what was asked for together: iterate over them, from any thread, until all texts have ended.

    What is not finished is cancelled when the iteration is closed, with `cancel`, at the end of a `with` block, or once
    nobody refers to it any more.
    """

    def __init__(
        self,
        stops: Mapping[int, threading.Event],
        count: int,
        events: queue.SimpleQueue[Event],
        wake: Callable[[], None],
    ) -> None:
        self._stops, self._left, self._events, self._wake = stops, count, events, wake
        self._finalizer = weakref.finalize(self, _cancel, list(stops.values()), wake)

    def cancel(self, column: int | None = None) -> None:
        """End one text, or all; each still has its last event."""
        _cancel([stop for key, stop in self._stops.items() if column in (None, key)], self._wake)

    def __iter__(self) -> Iterator[Event]:
        try:
            while self._left:
                event = self._events.get()
                if isinstance(event, Finished | Failed):
                    self._left -= 1
                yield event
        finally:
            self.cancel()

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


def _cancel(stops: Sequence[threading.Event], wake: Callable[[], None]) -> None:
    for stop in stops:
        stop.set()
    wake()
