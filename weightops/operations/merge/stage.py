"""What a merge file says, as values: one stage per YAML document, in mergekit's language."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weightops.io.yaml_document import Document, Place
from weightops.operations.merge.references import Reference
from weightops.operations.merge.settings import Settings
from weightops.ops.merging.method import Method
from weightops.spec import DType


@dataclass(frozen=True)
class Source:
    """A model that goes into a slice: with layers `[first, stop)`, or all of them where `layers` is None."""

    model: Reference
    place: Place
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers that are made of as many layers of each source. `base` is the base model among them, if there is one."""

    sources: tuple[Source, ...]
    base: Reference | None
    place: Place
    parameters: Settings = field(default_factory=dict)

    @property
    def base_index(self) -> int | None:
        """Which of the sources is the base."""
        return next((i for i, source in enumerate(self.sources) if source.model == self.base), None)


@dataclass(frozen=True)
class Module:
    """A part of a model: slices one upon the other, merged by one method.

    `name` is what the names of its tensors begin with; a name that no tensor has stands for all that other modules do
    not take. `levels` are parameters that count where a slice has none: the module's own, then the file's.
    """

    name: str
    method: Method
    slices: tuple[Slice, ...]
    levels: tuple[Settings, Settings]
    place: Place = ()

    @property
    def is_sliced(self) -> bool:
        """Whether the file says which layers are taken."""
        return any(source.layers is not None for piece in self.slices for source in piece.sources)


@dataclass(frozen=True)
class TokenRule:
    """Where the row of a token comes from in models that lack it; with `force` in all of them.

    From `model`, where it is called `token`, or has the number `token`, or is the token itself if that is None;
    zeros; or, with `default`, what it would be without a rule.
    """

    kind: Literal["default", "zero", "model"]
    model: Reference | None = None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerChoice:
    """Whose tokens the result has, and where rows come from that a model lacks."""

    source: Reference | Literal["union", "base"]
    pad_to_multiple_of: int | None = None
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One merge. `unused` are fields that it has no use for, `models` where in the document each model is named."""

    modules: tuple[Module, ...]
    base: Reference | None
    dtype: DType | None
    out_dtype: DType | None
    tokenizer: TokenizerChoice | None
    chat_template: str | None
    name: str | None
    unused: tuple[str, ...]
    holders: tuple[str, ...]
    models: Mapping[Place, Reference]
    document: Document

    @property
    def references(self) -> tuple[Reference, ...]:
        """The models that it names, each once, in the order of the document."""
        return tuple(dict.fromkeys(self.models[place] for place in _places(self.document.data) if place in self.models))

    @property
    def donor(self) -> Reference:
        """The model whose configuration and tokenizer the result has: the base, or else the first source."""
        return self.base or self.modules[0].slices[0].sources[0].model

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it merges by."""
        return tuple(dict.fromkeys(module.method.name for module in self.modules))

    def plain(self, names: Mapping[Reference, str]) -> dict[str, Any]:
        """The document as data for JSON, with names for the models; without what only holds anchors."""
        kept = {key: value for key, value in self.document.data.items() if key not in self.holders}
        plain: dict[str, Any] = self._named(kept, (), names)
        return plain

    def _named(self, value: Any, place: Place, names: Mapping[Reference, str]) -> Any:
        if place in self.models:
            return names[self.models[place]]
        if isinstance(value, Mapping):
            return {key: self._named(each, (*place, key), names) for key, each in value.items()}
        if isinstance(value, list):
            return [self._named(each, (*place, str(i)), names) for i, each in enumerate(value)]
        return value


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    yield place
    pairs: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield from _places(each, (*place, str(key)))
