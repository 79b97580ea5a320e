"""The tokens of a folder by id, from whatever files of a tokenizer lie there, and those files with fewer tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from weightops.errors import CorruptInput, IncompatibleInputs, UsageError, WeightopsError
from weightops.formats.sidecars import Kind, kind_of
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.token_ids import ROLES, processor_ids
from weightops.layouts.tokenizers import needed
from weightops.layouts.tokenizers.files import (
    ADDED,
    PIECES,
    SENTENCEPIECE,
    SPECIAL_MAP,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TokenizerFiles,
)
from weightops.layouts.tokenizers.pieces import Pieces, read_pieces
from weightops.layouts.tokenizers.tokenizer_json import merge_pairs
from weightops.layouts.tokenizers.union import TokenizerDocument, tokenizer_document

Files = Mapping[str, bytes]
_VOCAB_JSON, _MERGES, _VOCAB_TXT = "vocab.json", "merges.txt", "vocab.txt"
_PIECES = (PIECES, "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model")
"""What families call a sentencepiece model; the ids of all but the first are only told by a tokenizer.json."""
_KNOWN = (TOKENIZER, *_PIECES, TOKENIZER_CONFIG, ADDED, SPECIAL_MAP, _VOCAB_JSON, _MERGES, _VOCAB_TXT)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class FolderVocabulary:
    """The tokens that the files of a folder give: `document` is its tokenizer.json, `pieces` its sentencepiece
    model, in the file `pieces_name`.

    One of the two is there; both are only where they agree on every id. `left` are files that hold tokens too, and are
    not edited here.
    """

    files: Files
    where: str
    document: Mapping[str, Any] | None
    pieces: Pieces | None
    pieces_name: str = PIECES
    left: tuple[str, ...] = field(default=())

    @cached_property
    def added(self) -> Mapping[str, int]:
        """The ids of tokens that are found in a text as a whole, by text."""
        if self.document is not None:
            found = TokenizerDocument(self.document, self.where).added
            return {text: int(entry["id"]) for text, entry in found.items()}
        return {text: number for number, text, _ in TokenizerFiles(self.files, self.where).added()}

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The ids of all tokens, by text."""
        if self.document is not None:
            return TokenizerDocument(self.document, self.where).ids
        assert self.pieces is not None
        return {**self.pieces.ids, **self.added}

    @property
    def count(self) -> int:
        """One more than the highest id."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """The special tokens by what they are for, such as eos."""
        files = TokenizerFiles(self.files, self.where)
        found: dict[str, str] = {}
        for name in (SPECIAL_MAP, TOKENIZER_CONFIG):
            document = files.document(name)
            texts = {role: content(document.get(f"{role}_token")) for role in ROLES}
            found |= {role: text for role, text in texts.items() if text is not None and text in self.ids}
        return found

    def made_document(self) -> Mapping[str, Any]:
        """A tokenizer.json made of its tokenizer.model: here, where it is one as LLaMA has, else by transformers."""
        try:
            made = tokenizer_document(TokenizerFiles(self.files, self.where))
            assert made is not None
            return made.document
        except UsageError:
            return _through_transformers(self.files, self.where)

    def needed(self, texts: Iterable[str]) -> tuple[set[str], Mapping[str, str]]:
        """The tokens that a corpus needs, which is gone through several times, with those that spell any text.

        Also digests of how it is cut, by file. See `weightops.layouts.tokenizers.needed`.
        """
        found: set[str] = set()
        parts: list[needed.Parts] = []
        cuts: dict[str, needed.Cuts] = {}
        if self.document is not None:
            tokenizer = needed.opened(self.files[TOKENIZER], self.where)
            cuts[TOKENIZER] = needed.Cuts()
            found |= needed.tokens_of(self.document, tokenizer, texts, self.where, cuts[TOKENIZER])
            del tokenizer  # before there are parts, which take as much memory
            model = self.document["model"]
            parts += [needed.parts_of(model, self.where)] if needed.kind_of(model) == "BPE" else []
        if self.pieces is not None:
            cuts[self.pieces_name] = needed.Cuts()
            found |= needed.pieces_of(self.pieces, self.files[self.pieces_name], texts, cuts[self.pieces_name])
            parts.append(needed.parts_of_pieces(self.pieces))
        digests = {name: each.digest for name, each in cuts.items()}
        return needed.with_parts(found & self.ids.keys(), *parts), digests

    def keeping(self, new: Mapping[int, int]) -> dict[str, bytes]:
        """The files with the tokens whose ids `new` has, and those ids; files in `left` are not among them."""
        made = {name: data for name, data in self.files.items() if name not in self.left}
        if self.document is not None:
            made[TOKENIZER] = dumped(_document(self.document, new))
        if self.pieces is not None:
            made[self.pieces_name] = self.pieces.keeping(new)
        for name in (_VOCAB_JSON, _MERGES, _VOCAB_TXT):
            if name in made and self.document is not None:
                made[name] = _as_file(name, _document(self.document, new)["model"], made[name])
        files = TokenizerFiles(self.files, self.where)
        config = files.document(TOKENIZER_CONFIG)
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            moved = {str(new[int(k)]): v for k, v in decoder.items() if k.isdecimal() and int(k) in new}
            made[TOKENIZER_CONFIG] = strict_json.dumps({**config, "added_tokens_decoder": moved})
        if ADDED in made:
            moved = {text: new[number] for text, number in files.document(ADDED).items() if number in new}
            made[ADDED] = strict_json.dumps(moved)
        return made

    def with_tokens(self, texts: Iterable[str], *, special: bool) -> FolderVocabulary:
        """The same with tokens added behind the others; those that are there already keep what they are.

        Raises `IncompatibleInputs` where ids have gaps, so that tokenizers would not number them so.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self.ids]
        if not new:
            return self
        if self.document is None and self.pieces is not None and not self.pieces.is_bpe:
            # transformers 5 does not read a tokenizer.model of this kind together with added tokens.
            made = self.made_document()
            told = replace(self, document=made, files={**self.files, TOKENIZER: dumped(made)})
            return told.with_tokens(texts, special=special)
        flags = dict.fromkeys(_FLAGS, False) | {"special": special, "normalized": not special}
        ids = {text: self.count + i for i, text in enumerate(new)}
        made, files = dict(self.files), TokenizerFiles(self.files, self.where)
        document = self.document
        if document is not None:
            model = len(document["model"]["vocab"])
            if max([model - 1, *self.added.values()]) + 1 != self.count:
                raise IncompatibleInputs(
                    f"{self.where}/{TOKENIZER}: ids have gaps, and added tokens would be numbered otherwise when it is "
                    "read",
                    hint="save it once more with transformers, or close the gaps with `weightops vocab --trim`",
                )
            entries = [{"id": number, "content": text, **flags} for text, number in ids.items()]
            document = {**document, "added_tokens": [*(document.get("added_tokens") or ()), *entries]}
            made[TOKENIZER] = dumped(document)
        config = files.document(TOKENIZER_CONFIG)
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict) or document is None:
            more = {str(number): {"content": text, **flags} for text, number in ids.items()}
            made[TOKENIZER_CONFIG] = strict_json.dumps({**config, "added_tokens_decoder": {**(decoder or {}), **more}})
        if ADDED in made or document is None:
            made[ADDED] = strict_json.dumps({**files.document(ADDED), **ids})
        return replace(self, files=made, document=document)


def content(token: object) -> str | None:
    """The text of a token, which configs hold as it is or in an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def dumped(document: Mapping[str, Any]) -> bytes:
    """A tokenizer.json; compact, as many are so large that a text of them in between would be much memory."""
    return msgspec.json.encode(document)


def _loaded(data: bytes, what: str) -> dict[str, Any]:
    """A tokenizer.json as an object; raises `CorruptInput`."""
    try:
        document = msgspec.json.decode(data)  # in half of the memory of what is strict
        assert isinstance(document, dict)
        return document
    except (msgspec.DecodeError, UnicodeDecodeError, AssertionError, RecursionError):
        strict_json.load_object(data, what)
        raise CorruptInput(f"{what}: not JSON") from None


def read_vocabulary(files: Files, where: str) -> FolderVocabulary:
    """The tokens of a folder, of whose `files` those of a tokenizer count; others are kept along.

    Where there is neither tokenizer.json nor a sentencepiece tokenizer.model, transformers makes the former of what
    there is. Raises `UsageError` where there is no tokenizer, `CorruptInput` for damaged files.
    """
    document = _loaded(files[TOKENIZER], f"{where}/{TOKENIZER}") if TOKENIZER in files else None
    name = next((name for name in _PIECES if files.get(name, b"").startswith(SENTENCEPIECE)), PIECES)
    is_pieces = files.get(name, b"").startswith(SENTENCEPIECE)
    pieces = read_pieces(files[name], f"{where}/{name}") if is_pieces else None
    if document is None and (pieces is None or name != PIECES):
        document = _through_transformers(files, where)
        files = {**files, TOKENIZER: dumped(document)}
    left = [name for name in _holders(files) if name not in _KNOWN]
    if document is not None:
        _check(document, where)
        ids = TokenizerDocument(document, where).ids
        if pieces is not None and any(ids.get(piece.text) != i for i, piece in enumerate(pieces.pieces)):
            pieces = None
        left += [other for other in _PIECES if other in files and (pieces is None or other != name)]
        left += [name for name in (_VOCAB_JSON, _MERGES, _VOCAB_TXT) if not _agrees(name, document, files)]
    else:
        left += [name for name in (_VOCAB_JSON, _MERGES, _VOCAB_TXT) if name in files]
    return FolderVocabulary(files, where, document, pieces, name, tuple(dict.fromkeys(left)))


def _check(document: Mapping[str, Any], where: str) -> None:
    """Raise `CorruptInput` for a tokenizer.json whose parts are of other types than they are read as."""
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    is_unigram = isinstance(model, Mapping) and needed.kind_of(model) == "Unigram"
    if not isinstance(vocabulary, list if is_unigram else dict):
        raise CorruptInput(f"{where}/{TOKENIZER}: has no vocabulary")
    odd = is_unigram and next((pair for pair in vocabulary if not _is_scored(pair)), None)
    if odd:
        raise CorruptInput(f"{where}/{TOKENIZER}: {escape(repr(odd))[:80]} is no piece with a score")


def _is_scored(pair: Any) -> bool:
    match pair:
        case [str(), int() | float()]:
            return True
    return False


def _holders(files: Files) -> list[str]:
    """The files of a tokenizer, but for its templates."""
    return [name for name in files if kind_of(name) is Kind.TOKENIZER]


def _through_transformers(files: Files, where: str) -> dict[str, Any]:
    """tokenizer.json as transformers makes it of vocab.txt, of vocab.json and merges.txt, and the like."""
    if not any(name not in (TOKENIZER_CONFIG, ADDED, SPECIAL_MAP) for name in _holders(files)):
        raise UsageError(
            f"{where}: has no tokenizer, whose tokens could be told from rows", hint="put its files beside the weights"
        )
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        for name, data in files.items():
            if "/" not in name:
                (Path(temporary) / name).write_bytes(data)
        try:
            made = AutoTokenizer.from_pretrained(temporary, trust_remote_code=False, local_files_only=True)
            return strict_json.load_object(made.backend_tokenizer.to_str().encode(), f"{where}/{TOKENIZER}")
        except WeightopsError:
            raise
        except Exception as error:  # whatever transformers has to say of files
            raise UsageError(
                f"{where}: its tokenizer is read neither here nor by transformers: {escape(str(error))[:200]}",
                hint="put a tokenizer.json beside it",
            ) from None


def _agrees(name: str, document: Mapping[str, Any], files: Files) -> bool:
    """Whether a file, if it is there, holds what tokenizer.json does, so that it can be written anew from that."""
    if name not in files:
        return True
    model = document["model"]
    try:
        if name == _VOCAB_JSON:
            return bool(strict_json.load_object(files[name], name) == model["vocab"])
        if name == _MERGES:
            return _as_file(name, model, files[name]).split() == files[name].split()
        texts = files[name].decode().splitlines()
        return bool({text: i for i, text in enumerate(texts)} == model["vocab"])
    except (WeightopsError, UnicodeDecodeError, KeyError, TypeError):
        return False


def _as_file(name: str, model: Mapping[str, Any], before: bytes) -> bytes:
    """vocab.json, merges.txt or vocab.txt of a tokenizer.json's model; the first line of merges stays, if it is one."""
    if name == _VOCAB_JSON:
        return json.dumps(model["vocab"], ensure_ascii=False).encode()
    if name == _VOCAB_TXT:
        return "".join(f"{text}\n" for text in model["vocab"]).encode()
    head = [before.decode().partition("\n")[0]] if before.startswith(b"#version") else []
    return "\n".join([*head, *map(" ".join, merge_pairs(model.get("merges"), name)), ""]).encode()


def _document(document: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer.json with fewer tokens and their new ids."""
    model = dict(document["model"])
    if needed.kind_of(model) == "Unigram":
        kept = sorted((new[i], pair) for i, pair in enumerate(model["vocab"]) if i in new)
        unknown = model.get("unk_id")
        model |= {"vocab": [pair for _, pair in kept], "unk_id": None if unknown is None else new[unknown]}
    else:
        pairs = sorted((new[number], text) for text, number in model["vocab"].items() if number in new)
        model["vocab"] = {text: number for number, text in pairs}
    if "merges" in model:
        prefix, known = model.get("continuing_subword_prefix") or "", model["vocab"]
        parts = merge_pairs(model["merges"], "merges")
        model["merges"] = [
            merge
            for merge, (left, right) in zip(model["merges"], parts, strict=True)
            if left in known and right in known and left + right.removeprefix(prefix) in known
        ]
    added = [{**entry, "id": new[entry["id"]]} for entry in document.get("added_tokens") or () if entry["id"] in new]
    made = {**document, "model": model, "added_tokens": sorted(added, key=lambda entry: entry["id"])}
    made["post_processor"] = processor_ids(document.get("post_processor"), lambda number: new[number])
    padding = document.get("padding")
    if isinstance(padding, Mapping) and type(padding.get("pad_id")) is int:
        made["padding"] = {**padding, "pad_id": new.get(padding["pad_id"], 0)}
    return made
