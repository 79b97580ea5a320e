"""What tokens mean, apart from how a tokenizer writes them: which tokens of two tokenizers are the same.

An ordinary token means its bytes: a byte-level tokenizer writes a visible character for each, sentencepiece an
underline for a space, WordPiece marks what goes on. A special token means what it is for (bos, eos, pad, ...), and else
its text. So `Ġthe` is `▁the`, and the `</s>` that ends texts of one is the `<|end|>` of another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from weightops.layouts.token_ids import ROLES
from weightops.layouts.tokenizers import needed
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.layouts.tokenizers.ranks import from_unicode, to_unicode
from weightops.layouts.tokenizers.tokenizer_json import is_byte
from weightops.layouts.tokenizers.tokens import Kind
from weightops.layouts.tokenizers.vocabulary import FolderVocabulary, dumped

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Key = tuple[str, str | bytes]
"""A meaning: ("bytes", those), ("byte", a single one that stands for itself), ("role", "eos") or ("text", a text)."""
Style = Literal["bytes", "spaces", "words", "plain"]


@dataclass(frozen=True)
class Meanings:
    """The tokens of a vocabulary by what they mean; `document` is its tokenizer.json, or one made of its pieces."""

    vocabulary: FolderVocabulary
    document: Mapping[str, object]

    @cached_property
    def style(self) -> Style:
        """How it writes what is in a text."""
        if needed.is_byte_level(self.document):
            return "bytes"
        parts = [self.document.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
        if any(needed.SPACE in json.dumps(part, ensure_ascii=False) for part in parts):
            return "spaces"
        return "words" if needed.kind_of(self._model) == "WordPiece" else "plain"

    @property
    def _model(self) -> Mapping[str, object]:
        model = self.document["model"]
        assert isinstance(model, Mapping)
        return model

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What cuts texts."""
        return needed.opened(dumped(self.document), self.vocabulary.where)

    @cached_property
    def special(self) -> set[str]:
        """The texts of tokens that stand for no text."""
        roles = set(self.vocabulary.roles.values())
        entries = self.document.get("added_tokens")
        found = entries if isinstance(entries, list) else []
        marked = {entry["content"] for entry in found if isinstance(entry, Mapping) and entry.get("special")}
        own = (
            {p.text for p in self.vocabulary.pieces.pieces if p.kind is Kind.CONTROL} if self.vocabulary.pieces else ()
        )
        said = {text for _, text, special in self._files.added() if special}
        return roles | marked | set(own) | said

    @property
    def _files(self) -> TokenizerFiles:
        return TokenizerFiles(self.vocabulary.files, self.vocabulary.where)

    def keys(self, text: str) -> list[Key]:
        """What a token means, in the order in which others are looked for that mean the same."""
        if text in self.special:
            roles = [role for role in ROLES if self.vocabulary.roles.get(role) == text]
            return [*(("role", role) for role in roles), ("text", text)]
        if text in self.vocabulary.added:
            return [("bytes", text.encode())]
        if is_byte(text) and self.style != "bytes":
            byte = bytes([int(text[3:5], 16)])
            return [("byte", byte), ("bytes", byte)]
        found = self._bytes(text)
        return [("bytes", found), *([("byte", found)] if len(found) == 1 else [])]

    def _bytes(self, text: str) -> bytes:
        match self.style:
            case "bytes":
                try:
                    return from_unicode(text)
                except ValueError:
                    return text.encode()
            case "spaces":
                return text.replace(needed.SPACE, " ").encode()
            case "words":
                prefix = str(self._model.get("continuing_subword_prefix", "##"))
                return text.removeprefix(prefix).encode() if text.startswith(prefix) else b" " + text.encode()
        return text.encode()

    @cached_property
    def by_key(self) -> Mapping[Key, int]:
        """The id of the first token of each meaning; what a token means first counts before what it may mean else."""
        found: dict[Key, int] = {}
        else_: list[tuple[Key, int]] = []
        for text, number in sorted(self.vocabulary.ids.items(), key=lambda item: item[1]):
            first, *others = self.keys(text)
            found.setdefault(first, number)
            else_ += [(key, number) for key in others]
        for key, number in else_:
            found.setdefault(key, number)
        return found

    def text(self, token: str) -> bytes:
        """What a token is in a text."""
        key = self.keys(token)[0]
        return key[1] if isinstance(key[1], bytes) else token.encode()

    def split(self, data: bytes) -> list[int]:
        """The ids of the tokens that some bytes within a text are cut into, without those that spell nothing."""
        if self.style == "bytes":
            try:
                ids = list(self.tokenizer.encode(data.decode(), add_special_tokens=False).ids)
            except UnicodeDecodeError:
                ids = [token.id for token in self.tokenizer.model.tokenize(to_unicode(data))]
        elif self.style == "spaces":
            text = data.decode("utf-8", "surrogateescape").replace(" ", needed.SPACE)
            try:
                text.encode()
                ids = [token.id for token in self.tokenizer.model.tokenize(text)]
            except UnicodeEncodeError:
                spelled = [self.vocabulary.ids.get(f"<0x{byte:02X}>") for byte in data]
                ids = [number for number in spelled if number is not None]
        else:
            ids = self.encode(data.decode("utf-8", "replace"))
        unknown = self.vocabulary.ids.get(self.vocabulary.roles.get("unk", "<unk>"))
        return [number for number in ids if number != unknown]

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text, special tokens in it being found, and none put around it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def read_meanings(vocabulary: FolderVocabulary) -> Meanings:
    """The meanings of a folder's tokens; raises `CorruptInput` and `UsageError`."""
    return Meanings(vocabulary, vocabulary.document or vocabulary.made_document())
