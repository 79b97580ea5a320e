"""A conversation with a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from weightops.errors import Interrupted, PromptTooLong, UsageError, WeightopsError
from weightops.inference.events import Event, Failed, Token
from weightops.inference.pool import Pool, Request, Texts
from weightops.inference.prompts import Conversation
from weightops.inference.settings import Settings
from weightops.io.strict_json import as_json


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What the system, a user or the assistant says."""

    role: str
    content: str


class ChatDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-chat/1"):
    """A conversation as it is saved: with which model, by which template, and what was said."""

    model: str
    template: str
    messages: tuple[Message, ...]


class Chat:
    """A conversation with one of the models of a pool: what is said and answered is in `messages`.

    An answer that is cut short, or not wanted to its end, is kept as far as it came.
    """

    def __init__(
        self,
        pool: Pool,
        model: str,
        *,
        system: str | None = None,
        template: str | Path = "own",
        settings: Settings | None = None,
    ) -> None:
        """Raises `UsageError` for a model without a template, and what else `find_template` raises."""
        self._pool, self.model, self.template = pool, model, template
        self._settings = settings or Settings()
        self._system = system
        self.messages: list[Mapping[str, Any]] = []
        self._tries = 0
        self._texts: Texts | None = None
        self.clear()
        pool.find_template(model, template)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there is to say about the model's files."""
        return self._pool.model(self.model).warnings

    @property
    def streams_weights(self) -> bool:
        """Whether the model is so large that its blocks are read from disk for every token."""
        return any(each.streams_weights for each in self._pool.plan() if each.name == self.model)

    def clear(self) -> None:
        """Begin anew, with the system's message alone."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._tries = 0

    def say(self, text: str) -> Iterator[Event]:
        """What the model answers to a user's message, as events; see `weightops.inference.events`.

        Raises `PromptTooLong` where the conversation and the answer are more than the model has positions, and what
        else ends the answer; the conversation is then what it was.
        """
        self._tries = 0
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> Iterator[Event]:
        """Another answer in the place of the last; drawn with the next seed. Raises `UsageError` if there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no answer yet", hint="say something first")
        self._tries += 1
        return self._answer(self.messages[:-1])

    def stop(self) -> None:
        """End the answer that is coming, from any thread."""
        if self._texts is not None:
            self._texts.cancel()

    def document(self) -> dict[str, Any]:
        """The conversation, of schema `weightops-chat/1`."""
        said = tuple(Message(role=each["role"], content=each["content"]) for each in self.messages)
        return as_json(ChatDocument(model=self.model, template=str(self.template), messages=said))

    def close(self) -> None:
        """Give the memory of all models of the pool back."""
        self._pool.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
        sampling = replace(self._settings.sampling, seed=self._settings.sampling.seed + self._tries)
        settings = replace(self._settings, sampling=sampling)
        prompt = Conversation(tuple(messages), self.template)
        self._texts = texts = self._pool.submit([Request(self.model, prompt, settings)])
        said = ""
        try:
            for event in texts:
                if isinstance(event, Failed):
                    messages = self.messages
                    raise error_of(event)
                if isinstance(event, Token):
                    said += event.text
                yield event
        finally:
            texts.cancel()
            self._texts = None
            if messages is not self.messages:
                self.messages = [*messages, {"role": "assistant", "content": said}]


def error_of(event: Failed) -> WeightopsError:
    """What a text failed with, to be raised."""
    import weightops.errors

    if event.error == "Interrupted":
        return Interrupted(event.code - 128)
    kind = getattr(weightops.errors, event.error, WeightopsError)
    if kind is PromptTooLong:
        return PromptTooLong(event.message, hint="begin anew, or ask for fewer new tokens")
    error: WeightopsError = kind(event.message, hint=event.hint)
    return error
