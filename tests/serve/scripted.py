"""An engine that says what it is told to, a piece at a time, as long as nobody stops it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from weightops.errors import UsageError
from weightops.inference.events import Event, Finished, Started, Token
from weightops.serve.bodies import Ask
from weightops.serve.engine import ModelCard


@dataclass
class Script:
    """A ticket of texts in threads of their own."""

    cancelled: set[int | None] = field(default_factory=set)

    def cancel(self, column: int | None = None) -> None:
        self.cancelled.add(column)

    def is_cancelled(self, column: int) -> bool:
        return not self.cancelled.isdisjoint({None, column})


class Scripted:
    """Every model answers with its pieces; `delay_s` between them. `asked` is everything that was asked for."""

    def __init__(self, texts: Mapping[str, Sequence[str]], delay_s: float = 0.0, most: int = 512) -> None:
        self.cards = {name: ModelCard(name=name, created=1, max_positions=most, has_template=True) for name in texts}
        self.asked: list[Ask] = []
        self.tickets: list[Script] = []
        self.live = 0
        self._texts, self._delay_s, self._most = texts, delay_s, most
        self._lock = threading.Lock()

    def submit(self, asks: Sequence[Ask], put: Callable[[Event], None]) -> Script:
        for ask in asks:
            length = len(str(ask.messages or ask.prompt))
            if length > 50 * self._most:
                raise UsageError(f"the prompt has {length} tokens, the model has {self._most} positions")
        self.asked += asks
        ticket = Script()
        self.tickets.append(ticket)
        for i, ask in enumerate(asks):
            threading.Thread(target=self._say, args=(i, ask, ticket, put), daemon=True).start()
        return ticket

    def _say(self, column: int, ask: Ask, ticket: Script, put: Callable[[Event], None]) -> None:
        with self._lock:
            self.live += 1
        start, said, finish = time.monotonic(), [], "eos"
        put(Started(column=column, prompt_tokens=3, cached_tokens=0))
        for i, piece in enumerate(self._texts[ask.model]):
            time.sleep(self._delay_s)
            if ticket.is_cancelled(column):
                finish = "cancelled"
                break
            if i == ask.settings.max_new_tokens:
                finish = "length"
                break
            said.append(piece)
            logprob = None if ask.settings.logprobs is None else -0.5
            put(Token(column=column, id=i, text=piece, logprob=logprob))
        with self._lock:
            self.live -= 1
        put(
            Finished(
                column=column,
                finish=finish,  # type: ignore[arg-type]
                text="".join(said),
                tokens=tuple(range(len(said))),
                prompt_tokens=3,
                cached_tokens=0,
                first_token_s=self._delay_s,
                elapsed_s=time.monotonic() - start,
            )
        )

    def spell(self, model: str, token: int) -> tuple[str, bytes]:
        text = self._texts[model][token]
        return text, text.encode()

    def stop(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    def close(self) -> None:
        self.stop()
