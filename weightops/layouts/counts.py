"""What config.json asks for, against what the files hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.io.escape import escape

_COUNTS = re.compile(r"(?!max_)(.*_)?(n_layer|(hidden_|n_)?layers|num_.*layer|num_blocks|(n|num)_.*blocks|depth)")
_EXPERTS = re.compile(r"(n|num)_(.*_)?experts")
"""Keys of config.json that count layers, and experts."""
_MOST = 2048


def beyond_files(config: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    """A sentence on the first count of layers or experts in config.json for which the files have too few tensors.

    Such a config costs time and memory as soon as it is read. A stacked tensor may hold as many experts as it is high.
    """
    most = len(checkpoint)
    experts = max([most, *(tensor.spec.shape[0] for tensor in checkpoint.values() if tensor.spec.shape)])
    found = _above(config, most, experts)
    return None if found is None else f"{found}, the files have {most} tensors"


def beyond_models(config: Mapping[str, Any]) -> str | None:
    """The same of a config without files, of more layers or experts than any model has."""
    found = _above(config, _MOST, _MOST)
    return None if found is None else f"{found}, no model has more than {_MOST}"


def _above(config: Mapping[str, Any], layers: int, experts: int) -> str | None:
    """What the first count of layers or experts is that is above these, if one is."""
    for key, value in numbers(config):
        name = key.rpartition(".")[2]
        limit = layers if _COUNTS.fullmatch(name) else experts if _EXPERTS.fullmatch(name) else None
        if limit is not None and value > limit:
            return f"config.json: {escape(key)} is {str(value)[:80]}"
    return None


def numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers in a config.json, by their keys, those of parts as `text_config.num_hidden_layers`."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif type(value) is int:
            yield f"{prefix}{key}", value
