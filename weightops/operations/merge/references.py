"""What a merge file calls a model: a folder, a repository on a hub, or either with an adapter merged into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from weightops.errors import UsageError
from weightops.formats.places import is_remote, is_repository_name
from weightops.io.escape import escape
from weightops.io.yaml_document import Document, Place

T = TypeVar("T")
HUB = "hf://"
Exists = Callable[[str], bool]
"""Whether there is a folder or file at a path, counted from where the merge file counts."""


@dataclass(frozen=True)
class Reference:
    """A model, by where it lies or by the name that it has; and the adapter that is merged into it, if one is."""

    model: str
    adapter: str | None = None

    def __str__(self) -> str:
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


def reference(text: str, exists: Exists) -> Reference:
    """What `path`, `path@revision` and `path+adapter` mean, each half being a path or `org/name`.

    What exists wins: a folder whose name holds `+` or `@` is that folder. What does not, and has the form of a
    repository's name, is one on the hub. Raises `UsageError` for more than one adapter, and for a revision of a folder.
    """
    if exists(text) or "+" not in text:
        return Reference(_place(text, None, exists))
    splits = [(text[:i], text[i + 1 :]) for i, c in enumerate(text) if c == "+" and text[:i] and text[i + 1 :]]
    there = [(model, adapter) for model, adapter in splits if exists(model) and ("+" not in adapter or exists(adapter))]
    splits = there or [(model, adapter) for model, adapter in splits if "+" not in f"{model}{adapter}"]
    if len(splits) != 1:
        raise UsageError(
            f"{escape(text)}: expected a model, or a model and one adapter as model+adapter",
            hint="several adapters are merged one after the other, by weightops merge-lora",
        )
    ((model, adapter),) = splits
    return Reference(_place(model, None, exists), _place(adapter, None, exists))


def _place(path: str, revision: str | None, exists: Exists) -> str:
    if exists(path):
        if revision is not None:
            raise UsageError(f"{escape(path)}: is here, where there is no revision {escape(revision)} of it")
        return path
    named = path if revision is None else f"{path}@{revision}"
    if is_remote(named):
        return named
    bare, _, found = named.partition("@")
    if found and exists(bare):
        raise UsageError(
            f"{escape(bare)}: is here, where there is no revision {escape(found)} of it",
            hint=f"hf://{escape(named)} is the one on the hub" if is_repository_name(named) else None,
        )
    return f"{HUB}{named}" if is_repository_name(named) else named


@dataclass(frozen=True)
class References:
    """Reads what stands for a model in a merge file. `stages` are names of what the file makes itself."""

    exists: Exists
    stages: frozenset[str] = frozenset()

    def read(self, document: Document, place: Place, value: Any) -> Reference:
        """The model that is meant by a text or by `{model: {path, revision}, lora: {path, revision}}`."""
        if not isinstance(value, Mapping):
            text = document.text(place, value)
            return _blaming(document, place, lambda: reference(text, self._is_there))
        _refuse_fields(document, place, value, ("model", "lora", "override_architecture"))
        model = self._part(document, (*place, "model"), value.get("model"))
        lora = value.get("lora")
        return Reference(model, None if lora is None else self._part(document, (*place, "lora"), lora))

    def _part(self, document: Document, place: Place, value: Any) -> str:
        fields = value if isinstance(value, Mapping) else {"path": value}
        _refuse_fields(document, place, fields, ("path", "revision"))
        path, revision = document.text((*place, "path"), fields.get("path")), fields.get("revision")
        said = None if revision is None else document.text((*place, "revision"), revision)
        return _blaming(document, place, lambda: _place(path, said, self._is_there))

    def _is_there(self, path: str) -> bool:
        return path in self.stages or self.exists(path)


def _blaming(document: Document, place: Place, read: Callable[[], T]) -> T:
    """What `read` gives; what it raises, with file, line and field."""
    try:
        return read()
    except UsageError as error:
        raise document.blame(place, error) from None


def _refuse_fields(document: Document, place: Place, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = next((name for name in value if name not in known), None)
    if unknown is not None:
        document.fail((*place, unknown), "unknown field", hint=f"there are {', '.join(known)}")
