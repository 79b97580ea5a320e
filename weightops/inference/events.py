"""What happens while models speak: one family of values, from which text, JSON lines and server-sent events are made.

A text's events come in this order: `Waiting` any number of times, `Started`, `Reading` once for each piece of a long
prompt, a `Token` for each, and `Finished`; or, at any time, `Failed`, which is the last.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from weightops.errors import WeightopsError

Finish = Literal["eos", "stop", "length", "cancelled"]
"""Why a text ended: at a token that ends texts, at a stop string, at its longest, or because somebody asked for it."""


Schema = Literal["weightops-text-event/1"]
SCHEMA: Schema = "weightops-text-event/1"


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """`column` is the number of the text among those that were asked for together."""

    schema: Schema = SCHEMA
    column: int = 0


class Waiting(_Event, frozen=True, kw_only=True, tag="waiting"):
    """Nothing is computed yet: others are before it, memory is needed that others hold, or its weights are loaded."""

    reason: Literal["queue", "memory", "loading"]


class Started(_Event, frozen=True, kw_only=True, tag="started"):
    """The prompt is being read. Of its tokens so many were read for an earlier prompt that began alike."""

    prompt_tokens: int
    cached_tokens: int


class Reading(_Event, frozen=True, kw_only=True, tag="reading"):
    """So many of the tokens of a long prompt have been read."""

    tokens: int
    prompt_tokens: int


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A token that might have come next, its own text, and the natural logarithm of its probability."""

    id: int
    text: str
    logprob: float


class Token(_Event, frozen=True, kw_only=True, tag="token"):
    """A token was chosen.

    `text` is what may be given out with it: it is empty while a character is not complete, or a stop string might have
    begun. Joined, these are the text. `logprob` and `top`, the most probable tokens in their order, are there if asked
    for: they are the model's own, before temperature and penalties.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


class Finished(_Event, frozen=True, kw_only=True, tag="finished"):
    """The text is whole, or was cut short.

    `first_token_s` is the time from `Started` to the first token, null if there is none; `elapsed_s` to the end.
    """

    finish: Finish
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float | None
    elapsed_s: float

    @property
    def new_tokens(self) -> int:
        """How many tokens came."""
        return len(self.tokens)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first in a second; None for fewer than two."""
        if self.first_token_s is None or len(self.tokens) < 2 or self.elapsed_s <= self.first_token_s:
            return None
        return (len(self.tokens) - 1) / (self.elapsed_s - self.first_token_s)


class Failed(_Event, frozen=True, kw_only=True, tag="failed"):
    """There will be no more of it: the error's class, what it says, and the exit code that the command line has."""

    error: str
    message: str
    hint: str | None
    code: int


Event = Waiting | Started | Reading | Token | Finished | Failed


def failed(error: Exception, column: int = 0) -> Failed:
    """An error as the last event of a text."""
    name = type(error).__name__
    if isinstance(error, WeightopsError):
        return Failed(column=column, error=name, message=str(error), hint=error.hint, code=error.exit_code)
    if isinstance(error, MemoryError):
        return Failed(column=column, error=name, message="out of memory", hint="give a larger --max-memory", code=16)
    return Failed(column=column, error=name, message=f"unexpected {name}: {error}", hint=None, code=1)
