"""A model of fewer, more or other layers, held against what transformers makes of its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.layouts.architecture import NotKnown, find
from weightops.layouts.families import is_told_by_a_table
from weightops.operations.check import architecture_findings

_HINT = "choose layers for which config.json can say so; the kinds of layers have to come in an order that it knows"


def hold(source: Checkpoint, result: Checkpoint, order: Sequence[int]) -> None:
    """Refuse a result that transformers would load otherwise than as the layers of `source` in this order.

    That are tensors with other names or shapes than it has for the new config.json, and settings of single layers that
    it takes to be others. Nothing is said of models that it does not know, or whose source is not as it says either.
    Raises `UsageError`.
    """
    config, edited = source.config(), result.config()
    if is_told_by_a_table(source, config):
        return
    if _problem(source, config) is not None:
        return
    problem = _problem(result, edited) or _moved(config, edited, order)
    if problem is not None:
        raise UsageError(f"{escape(source.name)}: with these layers, {problem}", hint=_HINT)


def _problem(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """What is the matter with a checkpoint's names and shapes, if there is something."""
    try:
        architecture = find(config, checkpoint, None)
    except NotKnown as error:
        return str(error)
    findings = architecture_findings(checkpoint, config, architecture)
    return next((finding.message for finding in findings if finding.severity == "error"), None)


def _moved(config: Mapping[str, Any], edited: Mapping[str, Any], order: Sequence[int]) -> str | None:
    """A setting with an entry for each layer that transformers takes to be another than that of the layers chosen."""
    count, before = _settings(config)
    _, after = _settings(edited)
    for key, value in before.items():
        found = after.get(key)
        if isinstance(value, list) and len(value) == count and isinstance(found, list) and found != value:
            expected = [value[layer] for layer in order]
            if found != expected:
                return f"transformers takes {escape(key)} to be {found}, expected {expected}"
    return None


def _settings(config: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many layers transformers takes the language model of a config.json to have, and how it sets the rest."""
    from weightops.layouts.skeleton import parse_config

    text = parse_config(config, "").get_text_config()
    return getattr(text, "num_hidden_layers", 0), vars(text)
