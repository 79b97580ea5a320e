"""The files of a Hugging Face tokenizer: what says which tokens there are, which are special, and how to chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightops.errors import CorruptInput
from weightops.io import strict_json
from weightops.io.escape import escape

PIECES, TOKENIZER, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ADDED, SPECIAL_MAP = "added_tokens.json", "special_tokens_map.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
TEMPLATE, OLD_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates/"
NAMES = (*(PIECES, TOKENIZER, TOKENIZER_CONFIG, ADDED, SPECIAL_MAP, CONFIG, GENERATION, TEMPLATE, OLD_TEMPLATE),)
"""All but additional templates, whose names are their own."""
SENTENCEPIECE = b"\n"
"""What a tokenizer.model begins with that is no list of ranks."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The bytes of those files that there are, by name; `where` is their folder, in errors."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    where: str = "tokenizer"

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @property
    def is_hugging_face(self) -> bool:
        """Whether they say all that there is to say, as those of a Hugging Face folder; else a tokenizer.model does."""
        is_pieces = self.files.get(PIECES, b"").startswith(SENTENCEPIECE)
        return TOKENIZER in self or (is_pieces and (TOKENIZER_CONFIG in self or CONFIG in self))

    def shown(self, name: str) -> str:
        """A file's name in errors."""
        return f"{self.where}/{name}"

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file as an object, empty if there is none; raises `CorruptInput`."""
        return strict_json.load_object(self.files[name], self.shown(name)) if name in self else {}

    def added(self) -> Iterator[tuple[int, str, bool | None]]:
        """Id and text of the tokens that were added to tokenizer.model, and whether they are special if that is said.

        Those of added_tokens.json come first; tokenizer_config.json says more of the same, or of any other.
        """
        for text, number in self.document(ADDED).items():
            if type(number) is not int or number < 0:
                raise CorruptInput(f"{self.shown(ADDED)}: the id of {escape(text)!r} is no number")
            yield number, text, None
        decoder = self.document(TOKENIZER_CONFIG).get("added_tokens_decoder")
        for key, token in decoder.items() if isinstance(decoder, dict) else ():
            match token:
                case {"content": str(text)} if key.isdecimal() and len(key) < 20:
                    yield int(key), text, bool(token.get("special"))
                case _:
                    raise CorruptInput(
                        f"{self.shown(TOKENIZER_CONFIG)}: added_tokens_decoder: {escape(key)} is no token"
                    )

    def added_templates(self) -> list[str]:
        """The names of the files in additional_chat_templates, sorted."""
        return sorted(name for name in self.files if name.startswith(MORE_TEMPLATES))
