"""The checkpoint's own tokenizer, and text as its tokens."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError
from weightops.inference.pieces import pieces as pieces  # the way back
from weightops.inference.templates.template import Template, render
from weightops.io import strict_json
from weightops.io.escape import escape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
_BESIDE = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_FOR_SENTENCEPIECE = {"protobuf": ("google", "google.protobuf"), "sentencepiece": ("sentencepiece",)}
"""Libraries that transformers reads tokenizer.model with, and their modules."""
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's files, as transformers reads it; no network, no code from the checkpoint.

    Raises `SourceMissing` if there is none, `CorruptInput` if transformers cannot read it, `UsageError` if it lacks a
    library for that.
    """
    from transformers import AutoTokenizer

    shown = escape(checkpoint.name)
    if not any(fnmatch(name, pattern) for name in checkpoint.sidecars for pattern in _VOCABULARIES):
        raise SourceMissing(
            f"{shown}: has no tokenizer (looked for {', '.join(_VOCABULARIES)})",
            hint="put the model's tokenizer files beside its weights",
        )
    wanted = (*_VOCABULARIES, *_BESIDE, *_TEMPLATES)
    with tempfile.TemporaryDirectory(prefix="weightops-") as name:
        for file in checkpoint.sidecars:
            if Path(file).name == file and any(fnmatch(file, pattern) for pattern in wanted):
                data = checkpoint.sidecar(file)
                assert data is not None
                (Path(name) / file).write_bytes(_without_code(data, shown) if file == "config.json" else data)
        try:
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise what they like
            lacking = [library for library in _FOR_SENTENCEPIECE if not _is_installed(library)]
            if lacking and "tokenizer.json" not in checkpoint.sidecars and "tokenizer.model" in checkpoint.sidecars:
                raise UsageError(
                    f"{shown}: has no tokenizer.json, and transformers reads tokenizer.model with "
                    f"{' and '.join(lacking)}, which {'are' if len(lacking) > 1 else 'is'} not installed",
                    hint=f"pip install {' '.join(lacking)}",
                ) from error
            reason = str(error).splitlines()[0].replace(name, checkpoint.name) if str(error) else type(error).__name__
            raise CorruptInput(f"{shown}: transformers cannot read its tokenizer: {escape(reason)}") from error
    return found


def _is_installed(library: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in _FOR_SENTENCEPIECE[library])


def _without_code(config: bytes, shown: str) -> bytes:
    """config.json without what names other files or weights: a tokenizer needs its model_type at most."""
    kept = ("model_type", "tokenizer_class")
    document = strict_json.load_object(config, f"{shown}: config.json", constants=True)
    return json.dumps({key: document[key] for key in kept if key in document}).encode()


def read_text(paths: Iterable[Path]) -> str:
    """Text files, joined by blank lines, with line feeds at the ends of lines; raises as `read_utf8` does."""
    return "\n\n".join(read_utf8(path).replace("\r\n", "\n").replace("\r", "\n") for path in paths)


def read_utf8(path: Path) -> str:
    """A text file, without the mark that some begin with.

    Raises `SourceMissing`, or `CorruptInput` for what is not text in UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptInput(f"{escape(str(path))}: is not text in UTF-8: {error.reason}") from None
    except OSError as error:
        raise SourceMissing(f"{escape(str(path))}: cannot be read: {error.strerror}") from None


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Tokens `[n]` int64 of a text, with the special tokens that the tokenizer puts around it (a bos, mostly)."""
    found: torch.Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return found.to(torch.int64)


def check_tokens(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase, vocab_size: int, shown: str) -> None:
    """Raise `IncompatibleInputs` if a token has no row in the embedding of `vocab_size` rows."""
    largest = int(tokens.max()) if len(tokens) else 0
    if largest >= vocab_size:
        raise IncompatibleInputs(
            f"{shown}: its tokenizer has {len(tokenizer)} tokens and gives the text token {largest}, "
            f"its embedding has {vocab_size} rows",
            hint="the tokenizer is that of another model, or the embedding was never enlarged for added tokens",
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Tokens `[n]` of a prompt; raises `UsageError` if it is no text."""
    refuse_surrogates(prompt)
    return encode(tokenizer, prompt)


def refuse_surrogates(text: str) -> None:
    """Raise `UsageError` for what is no text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("the prompt is not text in UTF-8", hint="give --prompt - and the text on stdin, in UTF-8")


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    asks: bool,
    where: Sequence[str] = (),
) -> list[torch.Tensor]:
    """Tokens `[n]` of each conversation; with `asks` it ends where an answer is to begin. `where` they come from.

    Raises `CorruptInput` if the template refuses one.
    """
    texts = render(template, conversations, tokenizer, asks=asks, where=where)
    found = [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0] for text in texts]
    return [tokens.to(torch.int64) for tokens in found]


def end_tokens(checkpoint: Checkpoint, tokenizer: Any, *, chat: bool = False) -> frozenset[int]:
    """Tokens that end a text: by generation_config.json, else config.json, else the tokenizer.

    A turn of a `chat` ends with the tokenizer's own end too, which the files of many chat models leave out. Raises
    `CorruptInput` for what is no number of a token.
    """
    own = frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])
    data = checkpoint.sidecar("generation_config.json")
    settings = strict_json.load_object(data, f"{checkpoint.name}: generation_config.json") if data is not None else {}
    for name, document in (("generation_config.json", settings), ("config.json", checkpoint.config())):
        found = document.get("eos_token_id")
        if found is not None:
            stated = frozenset(_token_ids(found, f"{escape(checkpoint.name)}: {name}", tokenizer))
            return stated | own if chat else stated
    return own


def _token_ids(value: object, where: str, tokenizer: Any) -> list[int]:
    given = value if isinstance(value, list) else [value]
    ids = [token for token in given if type(token) is int]
    if len(ids) == len(given):
        return ids
    odd = next(token for token in given if type(token) is not int)
    known = tokenizer.get_vocab().get(odd) if isinstance(odd, str) else None
    raise CorruptInput(
        f"{where}: eos_token_id is {escape(json.dumps(value))[:80]}, expected the number of a token or a list of such",
        hint="write the token's number there, or null for the tokenizer's own end"
        if known is None
        else f"write {known}, which is the number of {escape(json.dumps(odd))}",
    )


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token stands for as bytes of UTF-8, which may begin or end within a character.

    Those of a token that is spelt as a byte (`<0xE4>`), or in GPT-2's alphabet of bytes; else those of its own text.
    """
    name = str(tokenizer.convert_ids_to_tokens(token))
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and '"ByteLevel"' in str(backend.decoder.__getstate__() if backend.decoder else ""):
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in name):
            return bytes(alphabet[character] for character in name)
    if "\u2581" in name:
        return name.replace("\u2581", " ").encode()
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()


@cache
def _byte_alphabet() -> Mapping[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
