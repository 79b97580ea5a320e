"""What a model is asked: a text to continue, or a conversation to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightops.errors import WeightopsError
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
    (found,) = prompted_all(opened, [prompt])
    if isinstance(found, WeightopsError):
        raise found
    return found


def prompted_all(opened: Opened, prompts: Sequence[Prompt]) -> list[Prompted | WeightopsError]:
    """Several at once, each with what `prompted` would raise; conversations of one template are filled in together."""
    found: dict[int, Prompted | WeightopsError] = {}
    by_template: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, Conversation):
            by_template.setdefault(str(prompt.template), []).append(i)
            continue
        try:
            tokens = opened.encode(prompt) if isinstance(prompt, str) else opened.checked(prompt)
            found[i] = Prompted(tokens, opened.ends())
        except WeightopsError as error:
            found[i] = error
    for numbers in by_template.values():
        some = [each for i in numbers if isinstance(each := prompts[i], Conversation)]
        found.update(zip(numbers, _answering(opened, some), strict=True))
    return [found[i] for i in range(len(prompts))]


def _answering(opened: Opened, conversations: Sequence[Conversation]) -> Sequence[Prompted | WeightopsError]:
    """Conversations of one template; alone where together they fail, so that each has its own error."""
    try:
        template = find_template(conversations[0].template, opened.tokenizer, opened.shown)
        for each in conversations:
            check_messages(each.messages)
            for message in each.messages:
                refuse_surrogates(message["content"])
        where = [opened.shown] * len(conversations)
        messages = [each.messages for each in conversations]
        ends = opened.ends(chat=True)
        return [
            Prompted(opened.checked(tokens), ends, template.stop)
            for tokens in encode_chats(opened.tokenizer, template, messages, asks=True, where=where)
        ]
    except WeightopsError as error:
        if len(conversations) == 1:
            return [error]
        return [result for each in conversations for result in _answering(opened, [each])]
