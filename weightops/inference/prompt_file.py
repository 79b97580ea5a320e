"""Prompts in a file: a line of text each, or a line of JSON with settings of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from weightops.errors import CorruptInput, UsageError
from weightops.inference.asked import Asked, settings_of
from weightops.inference.prompts import Conversation, Prompt, conversation
from weightops.inference.settings import Settings
from weightops.inference.tokens import read_utf8
from weightops.io import strict_json
from weightops.io.escape import escape

_OWN = ("id", "prompt", "messages", "system", "template")


@dataclass(frozen=True)
class Wanted:
    """A prompt of a file, by its number from 0, and what its line has for an id."""

    index: int
    prompt: Prompt
    settings: Settings
    id: str | int | None = None

    def document(self) -> list[Any]:
        """All of it as JSON."""
        prompt = asdict(self.prompt) if isinstance(self.prompt, Conversation) else self.prompt
        return [prompt, asdict(self.settings), self.id]


def read_prompts(
    path: Path, asked: Asked, *, chat: bool = False, system: str | None = None, template: str | None = None
) -> list[Wanted]:
    """The prompts in a file, of which empty lines are none.

    In a file `.jsonl` or `.ndjson` a line is a string or an object: `prompt` or `messages`, and if wanted `id`,
    `system`, `template` and any of the settings, which go before those that are `asked` for all. Raises
    `SourceMissing`, `CorruptInput` for a line that is none of this, `UsageError` for settings that cannot be meant.
    """
    shared: dict[str, Any] = {"system": system, "template": template}
    is_json = path.suffix in (".jsonl", ".ndjson")
    found: list[Wanted] = []
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{escape(str(path))}: line {number}"
        fields = _fields(line, where) if is_json else {"prompt": line.rstrip("\r")}
        given = {**shared, **{name: fields[name] for name in ("system", "template") if name in fields}}
        own = {name: value for name, value in fields.items() if name not in _OWN}
        try:
            settings = settings_of(msgspec.convert({**asked, **own}, Asked, strict=True))
        except msgspec.ValidationError as error:
            raise CorruptInput(f"{where}: {error}") from None
        except UsageError as error:
            raise UsageError(f"{where}: {error}", hint=error.hint) from None
        prompt = _prompt(fields, given, chat, where)
        found.append(Wanted(len(found), prompt, settings, fields.get("id")))
    if not found:
        raise UsageError(f"{escape(str(path))}: has no prompt", hint="write one in each line")
    return found


def _fields(line: str, where: str) -> Mapping[str, Any]:
    value = strict_json.loads(line.encode(), where)
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise CorruptInput(f"{where}: expected a string, or an object with either `prompt` or `messages`")
    unknown = next((name for name in value if name not in _OWN and name not in Asked.__annotations__), None)
    if unknown is not None:
        known = ", ".join((*_OWN, *Asked.__annotations__))
        raise CorruptInput(f"{where}: has a field {escape(unknown)}, which there is not", hint=f"there are {known}")
    for name in ("prompt", "system", "template"):
        if not isinstance(value.get(name), str | None):
            raise CorruptInput(f"{where}: {name} is {type(value[name]).__name__}, expected text")
    if not isinstance(value.get("id"), str | int | None):
        raise CorruptInput(f"{where}: id is {type(value['id']).__name__}, expected text or a number")
    return value


def _prompt(fields: Mapping[str, Any], given: Mapping[str, Any], chat: bool, where: str) -> Prompt:
    template = given["template"] or "own"
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
            raise CorruptInput(f"{where}: messages are no list of objects")
        has_system = bool(messages) and messages[0].get("role") == "system"
        before = [] if has_system or given["system"] is None else [{"role": "system", "content": given["system"]}]
        return Conversation((*before, *messages), template)
    if chat or given["system"] is not None or given["template"] is not None:
        return conversation(fields["prompt"], system=given["system"], template=template)
    prompt: str = fields["prompt"]
    return prompt
