"""The fields of a merge file, and where one belongs that stands elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from weightops.ops.merging.methods import METHODS

FORMS = ("models", "slices", "modules")
TOP = (
    *("merge_method", *FORMS, "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name"),
)
MODULE = ("models", "slices", "parameters", "merge_method")
SLICE = ("sources", "base_model", "parameters", "residual_weight")
MODEL = ("model", "parameters")
SOURCE = ("model", "layer_range", "parameters")
TOKENIZER = ("source", "pad_to_multiple_of", "tokens")
OF_MIXTURES = ("experts", "gate_mode", "experts_per_token", "shared_experts")
"""Of mergekit-moe, whose files are of another kind."""
_PLACES = (
    (TOP, "at the top of the file"),
    (SLICE, "beside the sources of a slice"),
    (SOURCE, "beside the model of a source, under slices:"),
    (TOKENIZER, "under tokenizer:"),
    (("revision",), "behind the model's name: model: NAME@REVISION"),
    (("plugin",), "on the command line alone, for it names a program: --plugin FILE"),
)
_WITHOUT_EFFECT = ("int8_mask",)
"""Parameters of mergekit that change its memory, not its results."""


def known_parameters() -> set[str]:
    """The parameters that some method has, or that mergekit reads."""
    return {*_WITHOUT_EFFECT, *(name for method in METHODS.values() for name in method.parameters)}


def belongs(key: str, known: Sequence[str], otherwise: str | None = None) -> str:
    """Where a field that is not among the known ones belongs, or which could be meant; else what `otherwise` says."""
    if key in known_parameters():
        return f"{key} is a parameter: write it under parameters:"
    elsewhere = next((where for keys, where in _PLACES if key in keys), None)
    if elsewhere is not None:
        return f"it belongs {elsewhere}"
    return nearest(key, {*known, *known_parameters()}, otherwise or f"there are {', '.join(known)}")


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Which of the known names could be meant, and what `otherwise` says."""
    near = difflib.get_close_matches(name.lower().replace("-", "_"), sorted(known), 1, 0.6)
    return f"is {near[0]} meant? {otherwise}" if near else otherwise
