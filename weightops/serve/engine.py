"""What the server wants of whatever makes texts: models by name, and events for each text that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from weightops.inference.events import Event
from weightops.serve.bodies import Ask


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model by the name that requests have for it.

    `max_positions` is the longest text in tokens; `template` the one that its tokenizer has, or None. `kind` is
    "local", or "remote" for one of another server.
    """

    name: str
    created: int
    max_positions: int | None = None
    has_template: bool = False
    kind: str = "local"
    note: str = ""


class Ticket(Protocol):
    """Texts that are being made."""

    def cancel(self, column: int | None = None) -> None:
        """Stop one of them, or all; what is stopped still says `Finished`. From any thread, as often as one likes."""


class Engine(Protocol):
    """Models, and texts of theirs."""

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        """The models by name, in their order."""

    def submit(self, asks: Sequence[Ask], put: Callable[[Event], None]) -> Ticket:
        """Begin texts; `put` is called with their events from another thread, the last of each `Finished` or `Failed`.

        Raises `WeightopsError` or `ApiError` for what can be seen to be wrong before anything is computed.
        """

    def spell(self, model: str, token: int) -> tuple[str, bytes]:
        """A token's own text and its bytes, which may be a part of a character."""

    def stop(self) -> None:
        """Stop all texts; safe in a signal handler."""

    def close(self) -> None:
        """Stop all texts, and give all memory back."""
