"""What a model is asked: a text to continue, or a conversation to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightops.inference.opened import Opened
from weightops.inference.settings import Settings
from weightops.inference.templates.template import check_messages, find_template
from weightops.inference.tokens import encode_chats, refuse_surrogates


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of them a user's, in a template: a tokenizer's `own`, one by name, or a file's."""

    messages: tuple[Mapping[str, Any], ...]
    template: str | Path = "own"


def conversation(said: str, *, system: str | None = None, template: str | Path = "own") -> Conversation:
    """One thing that a user says, after what the system says, if anything."""
    before = ({"role": "system", "content": system},) if system is not None else ()
    return Conversation((*before, {"role": "user", "content": said}), template)


Prompt = str | Conversation | Sequence[int]
"""A text to continue, a conversation to answer, or tokens."""


@dataclass(frozen=True)
class Prompted:
    """A prompt as a model takes it: its tokens, the tokens and strings at which what follows ends."""

    tokens: list[int]
    ends: frozenset[int]
    stop: tuple[str, ...] = ()

    def settings(self, settings: Settings) -> Settings:
        """Settings with the stop strings of the template."""
        return replace(settings, stop=(*settings.stop, *self.stop)) if self.stop else settings


def prompted(opened: Opened, prompt: Prompt) -> Prompted:
    """A prompt for a model.

    Raises `UsageError` for one that is empty or cannot be meant, `CorruptInput` for a template that fails,
    `IncompatibleInputs` for tokens that the model does not have.
    """
    if isinstance(prompt, str):
        return Prompted(opened.encode(prompt), opened.ends())
    if not isinstance(prompt, Conversation):
        return Prompted(opened.checked(prompt), opened.ends())
    check_messages(prompt.messages)
    for message in prompt.messages:
        refuse_surrogates(message["content"])
    template = find_template(prompt.template, opened.tokenizer, opened.shown)
    (tokens,) = encode_chats(opened.tokenizer, template, [prompt.messages], asks=True, where=[opened.shown])
    return Prompted(opened.checked(tokens), opened.ends(chat=True), template.stop)
