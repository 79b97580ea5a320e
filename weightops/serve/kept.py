"""Texts for pages, whose events are kept until a page has them: it fetches them in slices of a second.

A browser opens six connections to a server at most, over all its tabs. With one that lasts as long as a text, the
seventh tab would not even load; slices leave room for all. A page that goes says so, and one that cannot is missed.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from weightops.inference.events import Event, Finished
from weightops.serve.answers import sse
from weightops.serve.bodies import Ask
from weightops.serve.engine import Engine, Ticket
from weightops.serve.errors import ApiError
from weightops.serve.stream import texts_of

SLICE_S = 1.0
MISSED_S = 5.0
"""How long texts go on that no page fetches."""
_DONE_S = 30.0
"""How long events of texts that are done are kept at most for a page to fetch them."""
MAX_LIVE = 64


class Kept:
    """The texts that one page asked for at once, and those of their events that it does not have yet."""

    def __init__(self, names: Sequence[str]) -> None:
        self.name = secrets.token_urlsafe(24)
        self._names = list(names)
        self._ticket: Ticket | None = None
        self._events: deque[tuple[int, dict[str, Any]]] = deque()
        self._last = 0
        self._is_done = False
        self.delivered = asyncio.Event()
        """The page has all there is."""
        self._changed = asyncio.Event()
        self._fetched_s = time.monotonic()
        self._readers = 0

    async def keep(self, engine: Engine, asks: Sequence[Ask], begun: asyncio.Future[None]) -> None:
        """Begin the texts, and keep their events to their end; `begun` is told whether they have begun."""
        try:
            async with texts_of(engine, asks) as texts:
                self._ticket = texts.ticket
                begun.set_result(None)
                async for event in texts.events(SLICE_S):
                    if event is not None:
                        self._put(event)
                    if not self._readers and time.monotonic() - self._fetched_s > MISSED_S:
                        self.cancel()
        except BaseException as error:
            if begun.done():
                raise
            begun.set_exception(error)
        finally:
            self._add({"event": "closed"})
            self._is_done = True
            self._changed.set()

    def cancel(self, column: str | None = None) -> None:
        """Stop one text, or all; raises `ApiError` for a column that is not there."""
        if column is not None and column not in self._names:
            raise ApiError(404, "there is no such column", param="column", code="not_found")
        if self._ticket is not None:
            self._ticket.cancel(None if column is None else self._names.index(column))

    def _put(self, event: Event) -> None:
        document = msgspec.to_builtins(event)
        if isinstance(event, Finished):
            document |= {"new_tokens": event.new_tokens, "tokens_per_s": event.tokens_per_s}
            del document["tokens"]
        self._add({**document, "column": self._names[event.column]})

    def _add(self, document: dict[str, Any]) -> None:
        self._last += 1
        self._events.append((self._last, document))
        self._changed.set()

    async def slice(self, after: int) -> AsyncGenerator[bytes, None]:
        """Events after number `after` as they come, for a second at most; those up to it are not needed any more."""
        self._readers += 1
        until_s = time.monotonic() + SLICE_S
        try:
            while self._events and self._events[0][0] <= after:
                self._events.popleft()
            while True:
                self._changed.clear()
                for number, document in [pair for pair in self._events if pair[0] > after]:
                    after = number
                    yield sse({**document, "number": number})
                left_s = until_s - time.monotonic()
                if self._is_done:
                    self.delivered.set()
                    return
                if left_s <= 0:
                    return
                try:
                    await asyncio.wait_for(self._changed.wait(), left_s)
                except TimeoutError:
                    return
        finally:
            self._readers -= 1
            self._fetched_s = time.monotonic()


class Keeper:
    """All texts that pages have asked for, by their secret names."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, engine: Engine, asks: Sequence[Ask], names: Sequence[str]) -> Kept:
        """Begin texts; raises what keeps them from beginning."""
        if len(self._kept) >= MAX_LIVE:
            raise ApiError(429, f"{MAX_LIVE} pages wait already", code="rate_limit_exceeded", retry_after_s=5)
        kept, begun = Kept(names), asyncio.get_running_loop().create_future()
        self._kept[kept.name] = kept
        task = asyncio.create_task(self._hold(kept, engine, asks, begun))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await begun
        return kept

    async def _hold(self, kept: Kept, engine: Engine, asks: Sequence[Ask], begun: asyncio.Future[None]) -> None:
        try:
            await kept.keep(engine, asks, begun)
            if begun.exception() is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(kept.delivered.wait(), _DONE_S)
        finally:
            self._kept.pop(kept.name, None)

    def find(self, name: str) -> Kept:
        """The texts of that name; raises `ApiError` where there are none any more."""
        if name not in self._kept:
            raise ApiError(404, "there is no such stream any more", param="stream", code="not_found")
        return self._kept[name]
