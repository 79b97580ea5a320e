"""Tokenizers as one document each, without tokens that a model has no rows for, and with those of others added.

mergekit 0.1.5 gives new tokens ids in the order of a set, another from run to run; here they come by model, then by id.
Ordinary tokens of other models become added tokens, which are found in a text as a whole, as mergekit has them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.tokenizers.files import ADDED, PIECES, SPECIAL_MAP, TOKENIZER, TOKENIZER_CONFIG, TokenizerFiles
from weightops.layouts.tokenizers.hf import hf_files
from weightops.layouts.tokenizers.read import read_tokenizer

_MOST = 1 << 24
"""No tokenizer has so many tokens; a number above it would only fill memory."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerDocument:
    """A tokenizer.json; `where` is its folder, for messages."""

    document: Mapping[str, Any]
    where: str

    @cached_property
    def added(self) -> Mapping[str, Mapping[str, Any]]:
        """Added tokens by text, in the order of their ids."""
        entries = self.document.get("added_tokens") or []
        try:
            found = {entry["content"]: entry for entry in sorted(entries, key=lambda entry: entry["id"])}
        except (TypeError, KeyError):
            found = {None: {}}
        if not all(_is_token(text, entry.get("id")) for text, entry in found.items()):
            raise CorruptInput(f"{self.where}/{TOKENIZER}: added_tokens: expected tokens with content and id")
        return found

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The ids of all tokens, by text."""
        model = self.document.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list) and all(isinstance(pair, list) and pair for pair in vocabulary):
            found = [(pair[0], i) for i, pair in enumerate(vocabulary)]  # Unigram's: pairs of a text and a score
        elif isinstance(vocabulary, dict):
            found = list(vocabulary.items())
        else:
            raise CorruptInput(f"{self.where}/{TOKENIZER}: has no vocabulary")
        odd = next((pair for pair in found if not _is_token(*pair)), None)
        if odd is not None:
            raise CorruptInput(f"{self.where}/{TOKENIZER}: expected texts with their numbers, found {escape(str(odd))}")
        return dict(found) | {text: entry["id"] for text, entry in self.added.items()}

    def below(self, rows: int) -> TokenizerDocument:
        """Without the tokens whose ids are `rows` or more, and the merges that make or use them.

        Raises `IncompatibleInputs` for what is no BPE.
        """
        unused = {text for text, number in self.ids.items() if number >= rows}
        if not unused:
            return self
        model = self.document["model"]
        if model.get("type") != "BPE":
            raise IncompatibleInputs(
                f"{self.where}: has {len(unused)} tokens that the model has no rows for, such as "
                f"{escape(min(unused))}, and they can be taken out of BPE tokenizers alone",
                hint="take the tokenizer of another model: tokenizer: {source: MODEL}",
            )
        vocabulary = {text: number for text, number in model["vocab"].items() if text not in unused}
        try:
            merges = [merge for merge in model["merges"] if not unused & _parts(merge)]
        except (KeyError, TypeError):
            raise CorruptInput(f"{self.where}/{TOKENIZER}: expected merges, each of two texts") from None
        added = [entry for text, entry in self.added.items() if text not in unused]
        edited = {**self.document, "model": {**model, "vocab": vocabulary, "merges": merges}, "added_tokens": added}
        return TokenizerDocument(edited, self.where)

    def with_tokens(self, tokens: Iterable[Mapping[str, Any]]) -> TokenizerDocument:
        """With tokens added, each a text as `content` with its flags; those that are there keep their ids."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        wanted = [AddedToken(t["content"], **{f: bool(t.get(f, False)) for f in _FLAGS}) for t in tokens]
        if not wanted:
            return self
        try:
            backend = Backend.from_str(json.dumps(self.document))
        except Exception as error:  # whatever Rust has to say of a document
            raise CorruptInput(f"{self.where}/{TOKENIZER}: {escape(str(error))}") from None
        backend.add_tokens(wanted)
        return TokenizerDocument(json.loads(backend.to_str()), self.where)


def _is_token(text: Any, number: Any) -> bool:
    return isinstance(text, str) and type(number) is int and 0 <= number < _MOST


def _parts(merge: Any) -> set[str]:
    parts = merge.split(" ") if isinstance(merge, str) else list(merge)
    return {*parts, "".join(parts)}


def tokenizer_document(files: TokenizerFiles) -> TokenizerDocument | None:
    """The tokenizer of a folder as tokenizer.json, made of its tokenizer.model if need be; None if there is none.

    Raises `CorruptInput` and `UsageError`.
    """
    if TOKENIZER in files:
        return TokenizerDocument(strict_json.load_object(files.files[TOKENIZER], files.shown(TOKENIZER)), files.where)
    tokenizer = read_tokenizer(files, generation="3", instruct=False)
    if tokenizer is None:
        return None
    made = TokenizerDocument(strict_json.load_object(hf_files(tokenizer, None)[TOKENIZER], TOKENIZER), files.where)
    texts = {text: {"content": text, "special": bool(special)} for _, text, special in files.added()}
    return made.with_tokens(entry for text, entry in texts.items() if text not in made.ids)


def union(base: TokenizerDocument, others: Sequence[tuple[TokenizerDocument, int]]) -> TokenizerDocument:
    """`base` with the tokens of others that it lacks: ordinary ones first, then added ones, by model and id.

    Of others those count that have fewer than so many rows before them. An added token has the flags of the first that
    has it.
    """
    everything = [(base, 1 << 62), *others]
    added: dict[str, Mapping[str, Any]] = {}
    ordinary: dict[str, None] = {}
    for each, rows in everything:
        for text, number in sorted(each.ids.items(), key=lambda item: item[1]):
            if number >= rows:
                continue
            if text in each.added:
                added.setdefault(text, each.added[text])
            elif text not in base.ids:
                ordinary[text] = None
    new = [new_token(text) for text in ordinary if text not in added]
    return base.with_tokens([*new, *added.values()])


def new_token(text: str) -> dict[str, Any]:
    """A token as transformers adds a text."""
    return {"content": text, "normalized": True}


def tokenizer_files(made: TokenizerDocument, files: TokenizerFiles) -> dict[str, bytes]:
    """The files of a tokenizer that has changed: tokenizer.json, and the settings of `files`, with its added tokens."""
    config = files.document(TOKENIZER_CONFIG)
    decoder = {
        str(entry["id"]): {"content": text, **{flag: bool(entry.get(flag, False)) for flag in _FLAGS}}
        for text, entry in made.added.items()
    }
    if decoder:
        config = {**config, "added_tokens_decoder": decoder}
    config = {key: value for key, value in config.items() if key not in ("vocab_file", "merges_file")}
    kept = {name: files.files[name] for name in (SPECIAL_MAP,) if name in files}
    text = json.dumps(made.document, ensure_ascii=False, indent=2).encode()
    return {**kept, TOKENIZER: text, TOKENIZER_CONFIG: strict_json.dumps(config)}


LEFT = (PIECES, ADDED)
"""Files that say of a tokenizer what is no longer so once it has changed."""


def missing(texts: Collection[str], document: TokenizerDocument) -> list[str]:
    """Of texts those that are no tokens of a tokenizer."""
    return [text for text in texts if text not in document.ids]
