"""Tokenizers of the LLaMA family, apart from the files they come in."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

MAX_FILE_BYTES = 1 << 25
MAX_TOKENS = 1 << 19
MAX_TOKEN_BYTES = 512
MAX_MERGES = 1 << 21
"""Far above any real tokenizer, and low enough that a hostile one costs half a minute."""


class Kind(enum.IntEnum):
    """What a token is; the numbers are those of sentencepiece's `ModelProto.SentencePiece.Type`, and of ggml."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its text for sentencepiece, its bytes for ranks; `score` orders merges for sentencepiece."""

    data: bytes
    kind: Kind = Kind.NORMAL
    score: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """All tokens by id, special ones included, and the ids that a model needs.

    `sentencepiece`: LLaMA 1 and 2, Mistral: BPE over characters by score, with byte fallback. `ranks`: Llama 3:
    byte-level BPE, where the rank of a token is its id. `eos_ids`: the first ends a text; all of them end what an
    instruct model says. `data` are the bytes of the file `tokenizer.model` that it came from, or that it makes.
    """

    kind: Literal["sentencepiece", "ranks"]
    tokens: tuple[Token, ...] = field(repr=False)
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None = None
    pad_id: int | None = None
    add_dummy_prefix: bool = True
    data: bytes = field(repr=False)
