"""Names in LoRA adapters: which part of which module a tensor is, and the patterns that ranks are given by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io.escape import escape

_PREFIX = ("base_model", "model")
_FACTORS = ("lora_A", "lora_B")
_MATRICES = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
_MAX_PATH = 250
_LITERAL = re.compile(r"[\w.-]+", re.ASCII)
_ALARMING = re.compile(r"\)[*+{]|\\[1-9]")
_QUANTIFIER = re.compile(r"(?<!\\)[*+{]")
_MAX_QUANTIFIERS = 3
_MAX_PATTERN = 1000
_WRAPPERS = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module"}
"""What activation checkpointing, FSDP, torch.compile and DDP put into the names of the modules that they wrap."""


class Kind(Enum):
    """What a tensor of an adapter is."""

    A = auto()
    B = auto()
    BIAS = auto()
    EMBEDDING_A = auto()
    EMBEDDING_B = auto()
    MAGNITUDE = auto()
    ROWS = auto()
    """New rows of an embedding (`trainable_token_indices`)."""
    BASE = auto()
    """A tensor of the base itself, under a module that has factors."""
    WHOLE = auto()
    """A tensor that replaces one of the base."""
    COPY = auto()
    """The same once more, as peft saves it for embeddings that were resized."""
    ORIGINAL = auto()
    """What a tensor that is replaced was before."""


_WRAPPED = {"modules_to_save": Kind.COPY, "original_module": Kind.ORIGINAL}


@dataclass(frozen=True)
class Name:
    """`kind` of the module `path`; from `BASE` on the path is that of the tensor.

    `depth` counts the wrappers inside which the factors are: peft nests one for each parameter of a module.
    """

    kind: Kind
    path: str
    depth: int = 0


def parse_name(name: str, where: str) -> Name:
    """What a tensor in an adapter's file is, in any spelling since peft 0.1: with or without `base_model.model.`, the
    adapter's name (`lora_A.default.weight`), `modules_to_save`, or wrappers (`unwrapped`).

    Raises `IncompatibleInputs` for parts that plain LoRA and DoRA do not have.
    """
    parts = unwrapped(name).split(".")
    if tuple(parts[:2]) == _PREFIX:
        parts = parts[2:]
    found = _parse(parts)
    if found is None or len(name) > _MAX_PATH:
        raise IncompatibleInputs(
            f"{where}: {escape(name[:_MAX_PATH])} is no part of LoRA that is known here",
            hint="merge this adapter with peft itself",
        )
    return found


def unwrapped(name: str) -> str:
    """A name without the parts that wrappers have put into it, at any place."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _parse(parts: list[str]) -> Name | None:
    special = [i for i, part in enumerate(parts) if part.startswith("lora_") or part in ("token_adapter", "ranknum")]
    if special:
        at = special[-1]
        if parts[at:-1] == ["token_adapter", "base_layer"]:
            return Name(Kind.BASE, ".".join([*parts[:at], parts[-1]])) if at else None
        kind = _kind(parts[at], parts[at + 1 :])
        path, depth = parts[:at], 0
        while path and path[-1] == "base_layer":
            path, depth = path[:-1], depth + 1
        return Name(kind, ".".join(path), depth) if kind and path else None
    wrapper = next((i for i, part in enumerate(parts) if part in _WRAPPED), None)
    if wrapper is not None:
        kind, path = _WRAPPED[parts[wrapper]], parts[:wrapper]
        rest = parts[wrapper + 1 + (parts[wrapper + 1 : wrapper + 2] == ["default"]) :]
        return Name(kind, ".".join([*path, *rest])) if path and rest else None
    if len(parts) < 2 or "base_layer" in parts[:-2]:
        return None
    if parts[-2] == "base_layer":
        return Name(Kind.BASE, ".".join([*parts[:-2], parts[-1]])) if len(parts) > 2 else None
    return Name(Kind.WHOLE, ".".join(parts))


def _kind(part: str, rest: list[str]) -> Kind | None:
    """The kind of what comes after `part`: perhaps the adapter's name, and what parameter of it."""
    if part in _FACTORS and len(rest) in (1, 2) and rest[-1] in ("weight", "bias"):
        if rest[-1] == "weight":
            return Kind.A if part == "lora_A" else Kind.B
        return Kind.BIAS if part == "lora_B" else None
    if part in _MATRICES and len(rest) < 2:
        return Kind.EMBEDDING_A if part == "lora_embedding_A" else Kind.EMBEDDING_B
    if part == _MAGNITUDE and len(rest[:-1] if rest[-1:] == ["weight"] else rest) < 2:
        return Kind.MAGNITUDE
    if part == "token_adapter" and rest[:1] == ["trainable_tokens_delta"] and len(rest) < 3:
        return Kind.ROWS
    return None


class Patterns:
    """Numbers by pattern, as in `rank_pattern` and `alpha_pattern`: the first that fits the end of a path counts.

    Source: peft's `get_pattern_key`, `re.match(rf"(.*\\.)?({pattern})$", path)`. Patterns without special characters
    are looked up, with a dot standing for a dot only. Raises `CorruptInput` for what is no regular expression, or one
    that could take for ever.
    """

    def __init__(self, numbers: Mapping[str, float], where: str) -> None:
        self._numbers = list(numbers.values())
        self._literal = {key: i for i, key in enumerate(numbers) if _LITERAL.fullmatch(key)}
        self._patterns = [(i, _compiled(key, where)) for i, key in enumerate(numbers) if key not in self._literal]

    def find(self, path: str) -> float | None:
        """The number for a module, if there is one."""
        ends = [0, *(i + 1 for i, character in enumerate(path) if character == ".")]
        found = [i for at in ends if (i := self._literal.get(path[at:])) is not None]
        first = min(found, default=len(self._numbers))
        for i, pattern in self._patterns:
            if i < first and any(pattern.fullmatch(path, at) for at in ends):
                first = i
        return self._numbers[first] if first < len(self._numbers) else None


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern that takes no more than a moment."""
    if len(pattern) > _MAX_PATTERN or _ALARMING.search(pattern) or len(_QUANTIFIER.findall(pattern)) > _MAX_QUANTIFIERS:
        raise CorruptInput(
            f"{where}: the pattern {escape(pattern[:80])!r} is not tried: it could take for ever",
            hint="name the modules one by one",
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CorruptInput(
            f"{where}: {escape(pattern[:80])!r} is no pattern ({error})", hint="name the modules one by one"
        ) from None
