"""Which tensors of a base the modules of an adapter are: by name, by name but for a prefix, or tied ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.names import unwrapped
from weightops.io.escape import escape
from weightops.layouts.loaded_names import LoadedNames

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
HEADS = ("lm_head", "embed_out")


class Names:
    """The names in a base, to be found by the paths of an adapter.

    A path is the tensor of that name, or the one that transformers loads under it (`LoadedNames`). Bases are also saved
    without the first parts of their names, or with others: then all paths that are alike up to the number of a layer
    have these parts replaced in the way that finds most of them, and among those the one that keeps most of their
    parts.
    """

    def __init__(self, base: Checkpoint, paths: Iterable[str]) -> None:
        self._base = base
        self._names = {unwrapped(name): name for name in base}
        groups: dict[str, list[str]] = {}
        for path in paths:
            if self._exact(path) is None:
                groups.setdefault(_stem(path), []).append(path)
        self._ways = {stem: way for stem, found in groups.items() if stem and (way := self._way(stem, found))}

    def find(self, path: str) -> str | None:
        """The tensor that is meant by `path`, module and parameter; None if there is none.

        Raises `IncompatibleInputs` if there are several.
        """
        exact, stem = self._exact(path), _stem(path)
        if exact is not None:
            return exact
        ways = [self._ways[stem]] if stem in self._ways else [] if stem else self._ways.values()
        found = {self._exact(new + path.removeprefix(old)) for old, new in ways if path.startswith(old)}
        names = sorted(name for name in found if name is not None)
        if not stem and not names and module_of(path) in (*EMBEDDINGS, *HEADS):
            names = sorted(name for name in self._names.values() if name.split(".")[-2:] == path.split(".")[-2:])
        if len(names) > 1:
            raise _ambiguous(path, *names[:2])
        return names[0] if names else None

    def as_loaded(self, name: str) -> str:
        """What transformers, and so peft, calls a tensor of the base."""
        return self._loaded.of_file(unwrapped(name))

    def _exact(self, path: str) -> str | None:
        """The tensor of this name, or the one that transformers loads under it."""
        return self._names.get(path) or self._by_loaded.get(self._loaded.of_adapter(path))

    @cached_property
    def _loaded(self) -> LoadedNames:
        return LoadedNames(self._base)

    @cached_property
    def _by_loaded(self) -> dict[str, str]:
        """The tensors by the names under which transformers loads them."""
        return {self._loaded.of_file(known): name for known, name in sorted(self._names.items())}

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """The names of tensors in layers, by what they are from the number's own part on: `layers.0.mlp.weight`."""
        found: dict[str, list[str]] = {}
        for name in self._names:
            if stem := _stem(name):
                found.setdefault(stem.split(".")[-1] + name.removeprefix(stem), []).append(name)
        return found

    def _way(self, stem: str, paths: Sequence[str]) -> tuple[str, str] | None:
        """What the beginning of paths with this stem is to be replaced by, if anything fits."""
        last = stem.split(".")[-1]
        old = stem.removesuffix(last)
        ways = Counter(
            name.removesuffix(end)
            for path in paths
            for end in [last + path.removeprefix(stem)]
            for name in self._by_end.get(end, ())
        )
        if not ways:
            return None
        ranked = sorted(ways, key=lambda way: (ways[way], _shared(old, way)), reverse=True)
        if len(ranked) > 1 and len({(ways[way], _shared(old, way)) for way in ranked[:2]}) == 1:
            rest = paths[0].removeprefix(old)
            raise _ambiguous(paths[0], *sorted(way + rest for way in ranked[:2]))
        return old, ranked[0]


def _shared(first: str, second: str) -> int:
    """How many parts two beginnings of names have in common."""
    return len(set(first.split(".")[:-1]) & set(second.split(".")[:-1]))


def _stem(name: str) -> str:
    """A name up to the number of its layer: `model.layers` of `model.layers.0.mlp`; empty if there is none."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), 0)])


def _ambiguous(path: str, first: str, second: str) -> IncompatibleInputs:
    return IncompatibleInputs(
        f"{escape(path)} may be {escape(first)} or {escape(second)} of the base",
        hint="rename the adapter's tensors as the base has them",
    )


@dataclass
class Embeddings:
    """The input and the output embedding, by name, where there is one of each or fewer.

    A tied output embedding may have no tensor of its own; then `head` is None until an adapter names it.
    """

    embedding: str | None
    head: str | None
    is_tied: bool

    @property
    def names(self) -> set[str]:
        """Those that there are."""
        return {name for name in (self.embedding, self.head) if name is not None}


def module_of(name: str) -> str:
    """The last part of the module that a tensor belongs to."""
    return name.split(".")[-2] if "." in name else ""


def is_head(path: str) -> bool:
    """Whether a tensor is that of an output embedding, by its path."""
    return module_of(path) in HEADS and path.endswith(".weight")


def find_embeddings(base: Checkpoint) -> Embeddings:
    """The embeddings of a base: tied if config.json says so, they are one tensor, or the second is missing."""
    embeddings = [name for name in base if name.endswith(".weight") and module_of(name) in EMBEDDINGS]
    heads = [name for name in base if is_head(name)]
    if len(embeddings) != 1 or len(heads) > 1:
        return Embeddings(None, None, False)
    is_tied = tied_in_config(base.config())
    if heads:
        return Embeddings(embeddings[0], heads[0], is_tied is True or base[embeddings[0]] == base[heads[0]])
    return Embeddings(embeddings[0], None, is_tied is not False and _generates(base.config()) is not False)


def find_tensor(names: Names, known: Embeddings, path: str) -> str | None:
    """The tensor that `path` is, None if there is none; an output embedding that has none of its own counts as one."""
    name = names.find(path)
    if name is None and known.is_tied and is_head(path) and known.head in (None, path):
        known.head = name = path
    return name


def name_head(embedding: str, config: Mapping[str, Any]) -> str | None:
    """What transformers calls the output embedding of a model with this input embedding, if that is known."""
    is_known = embedding.startswith(("model.", "transformer.", "language_model.", "gpt_neox.")) or _generates(config)
    return "lm_head.weight" if is_known else None


def _generates(config: Mapping[str, Any]) -> bool | None:
    """Whether the model has an output embedding, by its class in config.json; None if that is not there."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return None
    return str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def tied_in_config(config: Mapping[str, Any]) -> bool | None:
    """What config.json says of `tie_word_embeddings`, that of a model's language part included."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None
