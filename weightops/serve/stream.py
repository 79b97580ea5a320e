"""From an engine's threads to a client, as it comes; and back: a client that is gone stops its texts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from starlette.requests import Request

from weightops.inference.events import Event, Failed, Finished
from weightops.serve.bodies import Ask
from weightops.serve.engine import Engine, Ticket

KEEP_ALIVE_S = 10.0


class Texts:
    """The events of the texts of one request."""

    def __init__(self, count: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._left = count
        self.ticket: Ticket | None = None

    def put(self, event: Event) -> None:
        """Take an event from a thread of the engine's."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def events(self, keep_alive_s: float | None = None) -> AsyncGenerator[Event | None, None]:
        """Events up to the last one of the last text; None now and then when none comes."""
        while self._left:
            try:
                event = await asyncio.wait_for(self._queue.get(), keep_alive_s)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Finished | Failed):
                self._left -= 1
            yield event


@asynccontextmanager
async def texts_of(engine: Engine, asks: Sequence[Ask]) -> AsyncIterator[Texts]:
    """Texts that are stopped when the block is left, however it is left."""
    texts = Texts(len(asks))
    # Tokenising, and checking what is asked for, is work: not for the loop that answers everybody.
    texts.ticket = await asyncio.to_thread(engine.submit, asks, texts.put)
    try:
        yield texts
    finally:
        texts.ticket.cancel()


async def gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
