"""Stop strings: a text ends before the first of them, and no part of one is ever given out."""

from __future__ import annotations

from collections.abc import Sequence

from weightops.errors import UsageError


class StopStrings:
    """Lets text through up to the first stop string in it, however the text is cut into pieces.

    The first is the one that is complete first, of several that end together the longest. As much of the end of the
    text as a stop string could begin with is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises `UsageError` for a stop string without a character."""
        if not all(stops):
            raise UsageError("a stop string is empty", hint="leave it out")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that the text ended at."""

    def push(self, text: str) -> str:
        """What may be given out of the text so far; nothing once a stop string was found."""
        if self.found is not None or not self._stops:
            return "" if self.found is not None else text
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            ready, self._held = self._held[:at], ""
            return ready
        at = self._tail()
        ready, self._held = self._held[:at], self._held[at:]
        return ready

    def end(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _tail(self) -> int:
        """Where the longest end of what is held begins that a stop string begins with."""
        longest = max(map(len, self._stops)) - 1
        for at in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[at:]) for stop in self._stops):
                return at
        return len(self._held)
