"""Calibration data: windows of tokens from text files, through the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from weightops.errors import CorruptInput, UsageError
from weightops.inference.templates.template import own_template
from weightops.inference.tokens import encode, encode_chats, read_text, read_utf8
from weightops.io.escape import escape

_FIELDS = ("text", "content")
_CONVERSATIONS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT calls those who speak, as templates know them."""


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens `[samples, tokens]` int64, and what there is to say of them."""

    tokens: torch.Tensor
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """xxh3_128 of the tokens."""
        return xxhash.xxh3_128_hexdigest(self.tokens.numpy().tobytes())


@dataclass(frozen=True)
class Chat:
    """A conversation: messages as chat templates take them, with text for content; `where` it was read."""

    messages: tuple[Mapping[str, Any], ...]
    where: str

    @property
    def text(self) -> str:
        """What is said in it, a line for each message that says something."""
        return "\n".join(message["content"] for message in self.messages if message["content"])


Document = str | Chat


def read_texts(paths: Iterable[Path]) -> list[str]:
    """The text of documents; see `read_documents`."""
    return [document if isinstance(document, str) else document.text for document in read_documents(paths)]


def read_documents(paths: Iterable[Path]) -> list[Document]:
    """The documents in text files, one in each, and in JSONL files, one in each line.

    A line of JSONL ends at a line feed and nowhere else. It is a string, or an object with `text`, `content` or a
    conversation in `messages` (or ShareGPT's `conversations`). Raises `SourceMissing`, `CorruptInput`, or `UsageError`
    if there is no text at all.
    """
    found: list[Document] = []
    for path in paths:
        if path.suffix in (".jsonl", ".ndjson"):
            lines = enumerate(read_utf8(path).split("\n"), 1)
            found += [_document(line, f"{escape(str(path))}: line {i}") for i, line in lines if line.strip()]
        else:
            found.append(read_text([path]))
    found = [each for each in found if (each if isinstance(each, str) else each.text).strip()]
    if not found:
        raise UsageError("there is no text to calibrate with", hint="give --calibration a text or JSONL file")
    return found


def _document(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CorruptInput(f"{where}: a string holds half of a surrogate pair") from None
    except (ValueError, RecursionError):
        raise CorruptInput(f"{where}: is not JSON") from None
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        for field in _FIELDS:
            if isinstance(value.get(field), str):
                return str(value[field])
        for field in _CONVERSATIONS:
            if isinstance(value.get(field), list):
                return Chat(tuple(_message(each, where) for each in value[field]), where)
    raise CorruptInput(f"{where}: has no text", hint="each line is a string, or an object with `text` or `messages`")


def _message(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CorruptInput(f"{where}: a message is {type(value).__name__}, expected an object")
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if content is None:
        content = ""  # a call of a tool
    elif isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        content = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    if not isinstance(content, str) or not isinstance(role, str | None):
        odd = type(role if isinstance(content, str) else content).__name__
        raise CorruptInput(
            f"{where}: a message's {'role' if isinstance(content, str) else 'content'} is {odd}, expected text"
        )
    rest = {key: each for key, each in value.items() if key not in ("from", "value")}
    return {**rest, "role": _ROLES.get(str(role), role), "content": content}


def calibrate(tokenizer: Any, documents: Sequence[Document], samples: int, seq_len: int, seed: int) -> Calibration:
    """`samples` windows of `seq_len` tokens from random places of the documents.

    Texts are joined by blank lines; conversations are what the tokenizer's chat template makes of them, if it has one.
    No token is used twice while there are others: the text is cut into windows from a random offset on, of which some
    are drawn. Raises `UsageError` for a text shorter than one window, `CorruptInput` for a conversation that the
    template refuses.
    """
    found = torch.cat([torch.empty(0, dtype=torch.int64), *_encoded(tokenizer, documents)])
    if len(found) < seq_len:
        raise UsageError(
            f"the calibration text has {len(found)} tokens, one sample is to have {seq_len}",
            hint="give more text to --calibration, or a shorter --seq-len",
        )
    draw = random.Random(seed)
    windows = len(found) // seq_len
    offset = draw.randrange(len(found) - windows * seq_len + 1)
    chosen = sorted(draw.sample(range(windows), min(samples, windows)))
    tokens = torch.stack([found[offset + i * seq_len : offset + (i + 1) * seq_len] for i in chosen])
    warnings: tuple[str, ...] = ()
    if windows < samples:
        warnings = (f"the calibration text makes {windows} samples of {seq_len} tokens, {samples} were asked for",)
    return Calibration(tokens, warnings)


def begun(data: Calibration, tokenizer: Any) -> Calibration:
    """The same with a bos token for the first of each window, where the tokenizer begins texts with one.

    Models keep numbers in it that are large in some columns; llama-imatrix does the same.
    """
    begins = encode(tokenizer, "a")[:1].tolist() == [tokenizer.bos_token_id]
    if not begins:
        return data
    tokens = data.tokens.clone()
    tokens[:, 0] = tokenizer.bos_token_id
    return replace(data, tokens=tokens)


def _encoded(tokenizer: Any, documents: Sequence[Document]) -> Iterator[torch.Tensor]:
    """Tokens of texts that follow one another, and of each conversation."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    chats = [document for document in documents if isinstance(document, Chat) and has_template]
    encoded = iter(_encoded_chats(tokenizer, chats) if chats else ())
    plain: list[str] = []
    for document in documents:
        if isinstance(document, Chat) and has_template:
            if plain:
                yield encode(tokenizer, "\n\n".join(plain))
                plain = []
            yield next(encoded)
        else:
            plain.append(document if isinstance(document, str) else document.text)
    if plain:
        yield encode(tokenizer, "\n\n".join(plain))


def _encoded_chats(tokenizer: Any, chats: Sequence[Chat]) -> list[torch.Tensor]:
    template = own_template(tokenizer, "the model")
    where = [chat.where for chat in chats]
    return encode_chats(tokenizer, template, [chat.messages for chat in chats], asks=False, where=where)
