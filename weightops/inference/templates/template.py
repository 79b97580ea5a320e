"""Chat templates: a tokenizer's own, one of the package's by name, or a file."""

from __future__ import annotations

import json
import string
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from weightops.errors import CorruptInput, SourceMissing, UsageError
from weightops.io import strict_json
from weightops.io.escape import escape

SECONDS = 10
"""What a template may take to be filled in."""
_NBYTES = 1 << 30
"""And how much memory."""
_RENDERER = Path(__file__).with_name("renderer.py")
_ROOT = Path(__file__).parents[3]
"""Where the renderer finds this package."""
ROLES = ("system", "user", "assistant")
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Template:
    """What a conversation is as one text: `text` is in jinja. An answer by it ends at the strings `stop`."""

    name: str
    text: str
    stop: tuple[str, ...] = ()


@cache
def named_templates() -> Mapping[str, Template]:
    """The package's own, by name."""
    data = files("weightops.inference.templates").joinpath("templates.toml").read_text(encoding="utf-8")
    found = tomllib.loads(data)
    return {name: Template(name, each["template"], tuple(each["stop"])) for name, each in found.items()}


def own_template(tokenizer: Any, shown: str) -> Template:
    """The tokenizer's; raises `UsageError`, which names others, if it has none."""
    try:
        text = tokenizer.get_chat_template()
    except ValueError:
        raise UsageError(
            f"{shown}: its tokenizer has no chat template",
            hint=f"give --template with a file, or one of {', '.join(named_templates())}",
        ) from None
    return Template("own", text)


def find_template(wanted: str | Path, tokenizer: Any, shown: str) -> Template:
    """`own`, one of the names, or a file: jinja, or JSON with `prompt_input`, `prompt_no_input`, `response_split`.

    Raises `UsageError` for what is none of these, `CorruptInput` for a file that is no template.
    """
    name = str(wanted)
    if name == "own":
        return own_template(tokenizer, shown)
    if name in named_templates():
        return named_templates()[name]
    path = Path(wanted)
    try:
        data = path.read_bytes()
    except OSError as error:
        if path.suffix or len(path.parts) > 1:
            raise SourceMissing(f"{escape(name)}: cannot be read: {error.strerror}") from None
        raise UsageError(
            f"{escape(name)} is neither a template nor a file",
            hint=f"choose a file, own, or one of {', '.join(named_templates())}",
        ) from None
    return read_template(data, path.name)


def read_template(data: bytes, name: str) -> Template:
    """The template in a file; raises `CorruptInput` for one that is no template."""
    shown = escape(name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptInput(f"{shown}: is not text in UTF-8: {error.reason}") from None
    if not text.lstrip().startswith("{") or text.lstrip().startswith(("{{", "{%", "{#")):
        return Template(name, text)
    document = strict_json.load_object(text.encode(), shown)
    if isinstance(document.get("chat_template"), str):
        return Template(name, document["chat_template"])
    return _of_prompts(document, name)


def _of_prompts(document: Mapping[str, Any], name: str) -> Template:
    """The template that alpaca-lora and KnowLM write in JSON, as jinja.

    With a system message, that is the instruction of the first turn, and what the user says its input.
    """
    fields = {key: document.get(key) for key in ("prompt_input", "prompt_no_input", "response_split")}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise CorruptInput(f"{escape(name)}: has no text {key}", hint="give a chat template in jinja, or such JSON")
    with_input = _as_jinja(fields["prompt_input"], {"instruction": "system", "input": "message['content']"}, name)
    without = _as_jinja(fields["prompt_no_input"], {"instruction": "message['content']"}, name)
    text = (
        "{{- bos_token }}"
        "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}"
        f"{{{{- {with_input} if system and loop.index0 == 1 else {without} }}}}"
        "{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}{%- endif %}"
        "{%- endfor %}"
    )
    return Template(name, text)


def _as_jinja(form: Any, variables: Mapping[str, str], name: str) -> str:
    """An expression of jinja for a format string of Python's with these fields."""
    parts = []
    try:
        for literal, field, _, _ in string.Formatter().parse(form):
            if literal:
                parts.append(json.dumps(literal, ensure_ascii=False))
            if field is not None:
                parts.append(variables[field])
    except (ValueError, KeyError) as error:
        raise CorruptInput(f"{escape(name)}: is no template: {escape(str(error))}") from None
    return f"({' ~ '.join(parts) or repr('')})"


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `UsageError` for what is no conversation that wants an answer: roles, texts, and who spoke last."""
    if not messages:
        raise UsageError("there are no messages", hint="give at least one of role user")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UsageError(f"message {i + 1} has role {escape(str(role))}", hint=f"choose one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UsageError(f"the content of message {i + 1} is {type(content).__name__}, expected text")
        if role == "system" and i > 0:
            raise UsageError(f"message {i + 1} is of role system", hint="only the first message may be")
    if messages[-1]["role"] != "user":
        raise UsageError("the last message is not of role user", hint="there is nothing to answer")


def render(
    template: Template,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    tokenizer: Any,
    *,
    asks: bool,
    where: Sequence[str] = (),
) -> list[str]:
    """What conversations are as texts; with `asks` each ends where an answer is to begin. `where` they come from.

    Raises `CorruptInput` for a template that fails, or takes more than 10 seconds or 1 GB of memory.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    # Those that a tokenizer does not have are no text.
    shared = {"bos_token": "", "eos_token": "", **special, "tools": None, "documents": None}
    variables = [
        {**shared, "messages": [_with_reasoning(each) for each in messages], "add_generation_prompt": asks}
        for messages in conversations
    ]
    seconds = SECONDS + len(variables) // 100
    job = {"template": template.text, "variables": variables, "seconds": seconds, "nbytes": _NBYTES}
    shown = f"the chat template {escape(template.name)}" if template.name != "own" else "the tokenizer's chat template"
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_RENDERER), str(_ROOT)],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CorruptInput(f"{shown} takes more than {seconds} seconds") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise CorruptInput(f"{shown} fails: {escape(last) or 'it takes too much time or memory'}") from None
    if "error" in found:
        at = found["at"]
        place = f"{where[at]}: " if where and at is not None else ""
        raise CorruptInput(f"{place}{shown} fails: {escape(found['error'])}")
    texts: list[str] = found["texts"]
    return texts


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with what was thought under the names that templates know, as transformers has it."""
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return dict(message) if thought is None else {"thinking": thought, **message, "reasoning_content": thought}
