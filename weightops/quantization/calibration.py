"""Calibration data: windows of tokens from text files, through the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from weightops.errors import CorruptInput, UsageError
from weightops.inference.tokens import encode, read_text
from weightops.io.escape import escape

_FIELDS = ("text", "content")


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens `[samples, tokens]` int64, and what there is to say of them."""

    tokens: torch.Tensor
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """xxh3_128 of the tokens."""
        return xxhash.xxh3_128_hexdigest(self.tokens.numpy().tobytes())


def read_texts(paths: Iterable[Path]) -> list[str]:
    """The documents in text files, one in each, and in JSONL files, one in each line.

    A line of JSONL is a string, or an object with `text`, `content` or a conversation in `messages`. Raises
    `SourceMissing`, `CorruptInput`, or `UsageError` if there is no text at all.
    """
    found: list[str] = []
    for path in paths:
        text = read_text([path])
        if path.suffix in (".jsonl", ".ndjson"):
            lines = enumerate(text.splitlines(), 1)
            found += [_document(line, f"{escape(str(path))}: line {i}") for i, line in lines if line.strip()]
        else:
            found.append(text)
    found = [text for text in found if text.strip()]
    if not found:
        raise UsageError("there is no text to calibrate with", hint="give --calibration a text or JSONL file")
    return found


def _document(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise CorruptInput(f"{where}: is not JSON") from None
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        for field in _FIELDS:
            if isinstance(value.get(field), str):
                return str(value[field])
        messages = value.get("messages")
        if isinstance(messages, list):
            return "\n".join(str(m["content"]) for m in messages if isinstance(m, dict) and "content" in m)
    raise CorruptInput(f"{where}: has no text", hint="each line is a string, or an object with `text` or `messages`")


def calibrate(tokenizer: Any, texts: Sequence[str], samples: int, seq_len: int, seed: int) -> Calibration:
    """`samples` windows of `seq_len` tokens from random places of the texts, joined by blank lines.

    No token is used twice while there are others: the text is cut into windows from a random offset on, of which some
    are drawn. Raises `UsageError` for a text shorter than one window.
    """
    found = encode(tokenizer, "\n\n".join(texts))
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
