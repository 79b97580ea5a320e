"""What files leave out, and loading the model brings back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.layouts.rotary import inverse_frequencies
from weightops.lazy import LazyTensor

ROTARY_SUFFIX = ".rotary_emb.inv_freq"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def as_loaded(base: Checkpoint, like: Iterable[str]) -> dict[str, LazyTensor]:
    """The tensors of `base`, with those of `like` that its file leaves out and loading the model brings back.

    A tied output embedding is the input embedding. Until 2023 transformers saved `rotary_emb.inv_freq` as a buffer,
    and computed it for files without: `theta ** -(2i / head_dim)` in float32, as is done here from config.json.
    """
    tensors = dict(base.tensors)
    lacking = [name for name in like if name not in tensors]
    if _HEAD in lacking and _EMBEDDING in tensors and base.config().get("tie_word_embeddings") is True:
        tensors[_HEAD] = tensors[_EMBEDDING]
    rotary = [name for name in lacking if name.endswith(ROTARY_SUFFIX)]
    if rotary:
        tensors |= dict.fromkeys(rotary, rotary_frequencies(base.config(), base.name))
    return tensors


def rotary_frequencies(config: Mapping[str, Any], name: str) -> LazyTensor:
    """`inv_freq` of the model with this config; raises `IncompatibleInputs` if that does not say enough."""
    parameters = config.get("rope_parameters")
    theta = config.get("rope_theta") or (parameters.get("rope_theta") if isinstance(parameters, dict) else None)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    width = config.get("head_dim") or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else None)
    theta = 10000.0 if theta is None else theta
    if not isinstance(width, int) or not 0 < width <= 1 << 16 or not isinstance(theta, (int, float)):
        raise IncompatibleInputs(
            f"{escape(name)}: has no rotary_emb.inv_freq, and its config.json has no head size to compute it from",
            hint="add config.json to the folder",
        )
    return inverse_frequencies(theta, width)
