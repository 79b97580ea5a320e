"""What a layout reads from: a checkpoint, the files beside it, and what the user has said of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from weightops.checkpoint import Checkpoint, Written
from weightops.errors import CorruptInput, UsageError
from weightops.formats.sidecars import Kind, kind_of
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.tokenizers.files import CONFIG, MORE_TEMPLATES, NAMES, TokenizerFiles
from weightops.lazy import LazyTensor
from weightops.stores.local import LocalStore, read_source

SETTINGS: Mapping[str, tuple[type, str]] = {
    "context_length": (int, "tokens that the model was trained for at once"),
    "rope_factor": (float, "by how much Llama 3.1's rope scaling stretches"),
    "rope_theta": (float, "base of the rotary frequencies"),
    "norm_eps": (float, "epsilon of the norms"),
    "n_heads": (int, "heads of q"),
    "pre": (str, "llama.cpp's name for how a tokenizer cuts texts before it merges tokens"),
    "instruct": (bool, "whether the model is an instruct one, whose turns end with <|eot_id|>"),
}
"""What files may leave unsaid, with its type."""
_ABSURD = 1e18
"""Above any number in a configuration, and so low that computing with it does not overflow."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to be converted. `read_file` gives a file beside it, None if there is none of that name.

    `evaluate` gives the bytes of a small tensor.
    """

    checkpoint: Checkpoint
    read_file: Callable[[str], bytes | None]
    evaluate: Callable[[LazyTensor], bytes]
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_own_tokenizer: bool = True
    """Whether its tokenizer, if any, is that of its folder."""

    @property
    def where(self) -> str:
        """Its name, safe for a terminal."""
        return escape(self.checkpoint.name)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file as an object; raises `CorruptInput`."""
        data = self.read_file(name)
        return None if data is None else strict_json.load_object(data, f"{self.where}/{name}")

    def parameters(self, name: str) -> dict[str, Any]:
        """The JSON file with the model's parameters; raises `UsageError` if there is none, and as `json` does."""
        found = self.json(name)
        if found is None:
            hint = "it comes with the weights, and says how many heads there are"
            raise UsageError(f"{self.where}/{name}: no such file", hint=hint)
        return found

    def tokenizer_files(self, *, layout: str) -> TokenizerFiles:
        """The files of its tokenizer, and its config.json where that is Hugging Face's."""
        more = [name for name in self.checkpoint.sidecars if name.startswith(MORE_TEMPLATES)]
        names = [name for name in (*NAMES, *more) if name != CONFIG or layout == "hf"]
        return TokenizerFiles({n: data for n in names if (data := self.read_file(n)) is not None}, self.where)

    def setting(self, name: str, stated: Any = None) -> Any:
        """What the user has said, or else the file; raises `UsageError` if the two differ."""
        given = self.settings.get(name)
        if given is not None and stated is not None and given != stated:
            raise UsageError(f"{self.where}: its own files say {name}={stated}, not {given}")
        return stated if given is None else given


def beside(checkpoint: Checkpoint, tokenizer: Path | Literal[False] | None) -> Callable[[str], bytes | None]:
    """Reads the files that go with a checkpoint, by name: those of its folder, or its sidecars if it has none.

    If `tokenizer` is given, the tokenizer is that file, with what lies beside it; if it is False there is none. Meta
    keeps its own in the folder above those of the models.
    """
    folder = checkpoint.folder
    above = LocalStore(folder.root.resolve().parent) if isinstance(folder, LocalStore) else None

    def read(name: str) -> bytes | None:
        if tokenizer is not None and kind_of(name) is Kind.TOKENIZER:
            if not tokenizer:
                return None
            if name.startswith("tokenizer."):
                return read_source(tokenizer)[1] if name.endswith(tokenizer.suffix) else None
            companions = LocalStore(tokenizer.parent)
            return companions.get(name) if companions.has(name) else None
        if folder is None or isinstance(checkpoint.sidecars.get(name), Written):  # which an operation has made
            return checkpoint.sidecar(name)
        if folder.has(name):
            return folder.get(name)
        return above.get(name) if name == "tokenizer.model" and above is not None and above.has(name) else None

    return read


def parse_settings(texts: Mapping[str, str]) -> dict[str, Any]:
    """The values of NAME=VALUE options; raises `UsageError` for names and values that mean nothing."""
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in SETTINGS:
            raise UsageError(f"unknown setting {name!r}", hint=f"known are {', '.join(SETTINGS)}")
        kind, meaning = SETTINGS[name]
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise UsageError(f"{name}={text} is no {kind.__name__}", hint=f"{name}: {meaning}") from None
        if kind in (int, float) and not 0 < values[name] < _ABSURD:
            raise UsageError(f"{name}={text} is not above zero", hint=f"{name}: {meaning}")
    return values


class Fields:
    """The fields of a JSON object, each checked for its type as it is taken."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self._document, self.where = document, where

    def number(self, name: str, default: float | None = None) -> float:
        """A number above zero; raises `CorruptInput` if it is not there and has no default, or is none."""
        value = self._document.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _ABSURD:
            raise CorruptInput(f"{self.where}: {name} is {escape(repr(value))[:80]}, expected a number above zero")
        return float(value)

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above zero; raises as `number` does."""
        value = self.number(name, default)
        if value != int(value) or value >= 1 << 40:
            raise CorruptInput(f"{self.where}: {name} is {value:.17g}, expected a whole number")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; raises `CorruptInput` for anything else."""
        value = self._document.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CorruptInput(f"{self.where}: {name} is {escape(repr(value))[:80]}, expected true or false")
        return value

    def get(self, name: str) -> Any:
        """Whatever is there."""
        return self._document.get(name)
