"""What a merge file says of the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from weightops.io.yaml_document import Document, Place, described
from weightops.operations.merge.fields import TOKENIZER, nearest
from weightops.operations.merge.references import Reference
from weightops.operations.merge.stage import TokenizerChoice, TokenRule

ReadModel = Callable[[Place, Any], Reference]


def read_tokenizer(document: Document, model: ReadModel) -> TokenizerChoice | None:
    """The choice under `tokenizer` or `tokenizer_source`, if there is one; `model` reads what stands for a model.

    Raises `UsageError`.
    """
    given, short = document.data.get("tokenizer"), document.data.get("tokenizer_source")
    if given is not None and short is not None:
        document.fail(
            ("tokenizer_source",), "says the same as tokenizer, which is there too", hint="use tokenizer: {source: ...}"
        )
    if short is not None:
        return TokenizerChoice(_source(("tokenizer_source",), short, model))
    if given is None:
        return None
    fields = _fields(document, ("tokenizer",), given, TOKENIZER)
    source = _source(("tokenizer", "source"), fields.get("source", "union"), model)
    multiple = fields.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        document.fail(("tokenizer", "pad_to_multiple_of"), f"expected a whole number, found {described(multiple)}")
    place = ("tokenizer", "tokens")
    rules = document.mapping(place, fields.get("tokens") or {})
    return TokenizerChoice(
        source, multiple, {text: _rule(document, (*place, text), each, model) for text, each in rules.items()}
    )


def _fields(document: Document, place: Place, value: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    fields = document.mapping(place, value)
    unknown = next((key for key in fields if key not in known), None)
    if unknown is not None:
        hint = nearest(unknown, known, f"there are {', '.join(known)}")
        document.fail((*place, unknown), "unknown field", hint=hint)
    return fields


def _source(place: Place, value: Any, model: ReadModel) -> Reference | Literal["union", "base"]:
    if value == "union" or value == "base":
        return "union" if value == "union" else "base"
    # `model:PATH` is how mergekit had it until 2024.
    return model(place, value.removeprefix("model:") if isinstance(value, str) else value)


def _rule(document: Document, place: Place, value: Any, model: ReadModel) -> TokenRule:
    fields = _fields(document, place, value, ("source", "force"))
    force, source, below = fields.get("force", False), fields.get("source"), (*place, "source")
    if not isinstance(force, bool):
        document.fail((*place, "force"), f"expected true or false, found {described(force)}")
    if source is None:
        return TokenRule("default", force=force)
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenRule("model", model(below, source), force=force)
    if source["kind"] == "zero":
        _fields(document, below, source, ("kind",))
        return TokenRule("zero", force=force)
    if source["kind"] != "model_token":
        document.fail((*below, "kind"), f"expected zero or model_token, found {described(source['kind'])}")
    _fields(document, below, source, ("kind", "model", "token", "token_id"))
    said = [key for key in ("token", "token_id") if source.get(key) is not None]
    if len(said) != 1 or source.get("model") is None:
        document.fail(below, "a model_token has a model, and either token or token_id")
    token = source[said[0]]
    if said[0] == "token":
        document.text((*below, "token"), token)
    elif type(token) is not int or token < 0:
        document.fail((*below, "token_id"), f"expected the number of a token, found {described(token)}")
    return TokenRule("model", model((*below, "model"), source["model"]), token, force)
