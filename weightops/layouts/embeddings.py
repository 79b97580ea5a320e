"""Input and output embeddings, whatever a layout calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from weightops.checkpoint import Checkpoint
from weightops.layouts.names import EMBEDDING, HEAD

Holds = Literal["input", "per layer", "output", "bias"]
"""What a tensor with an entry for each token holds: vectors that go in, those of one layer apart, what comes out."""

_VOCABULARY = (
    "embed_tokens.weight",
    "lm_head.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "embed_out.weight",
)
_OUTPUTS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("tok_embeddings.weight", "token_embd.weight")

_PAIRS = (
    ("model.language_model.embed_tokens", ("lm_head",)),
    ("model.text_model.embed_tokens", ("lm_head",)),
    ("model.decoder.embed_tokens", ("lm_head",)),
    ("model.embed_tokens", ("lm_head",)),
    ("model.tok_embeddings", ("output",)),
    ("transformer.wte", ("lm_head",)),
    ("transformer.embd.wte", ("lm_head.linear",)),
    ("transformer.embedding.word_embeddings", ("transformer.output_layer",)),
    ("transformer.word_embeddings", ("lm_head",)),
    ("gpt_neox.embed_in", ("embed_out", "lm_head")),
    ("backbone.embeddings", ("lm_head",)),
    ("backbone.embedding", ("lm_head",)),
)
"""Input embeddings, and what models call the output embedding that belongs to each; both lack `.weight`.

A prefix is the same before both, as in `language_model.model.embed_tokens` and `language_model.lm_head`.
"""

HOLDS: Mapping[str, tuple[Holds, int]] = {
    "embed_tokens.weight": ("input", 0),
    "tok_embeddings.weight": ("input", 0),
    "word_embeddings.weight": ("input", 0),
    "wte.weight": ("input", 0),
    "tokens_embed.weight": ("input", 0),
    "embed_in.weight": ("input", 0),
    "backbone.embeddings.weight": ("input", 0),
    "backbone.embedding.weight": ("input", 0),
    "shared.weight": ("input", 0),
    "embed_tokens_per_layer.weight": ("per layer", 0),
    "lm_head.weight": ("output", 0),
    "lm_head.linear.weight": ("output", 0),
    "lm_head.decoder.weight": ("output", 0),
    "embed_out.weight": ("output", 0),
    "output_layer.weight": ("output", 0),
    "shared_head.head.weight": ("output", 0),
    "predictions.decoder.weight": ("output", 0),
    "vocab_projector.weight": ("output", 0),
    "lm_head.bias": ("bias", 0),
    "lm_head.linear.bias": ("bias", 0),
    "lm_head.decoder.bias": ("bias", 0),
    "embed_out.bias": ("bias", 0),
    "output_layer.bias": ("bias", 0),
    "predictions.bias": ("bias", 0),
    "predictions.decoder.bias": ("bias", 0),
    "vocab_projector.bias": ("bias", 0),
    "final_logits_bias": ("bias", 1),
}
"""How names of tensors with an entry for each token end, what they hold, and along which dimension.

Among them are the embeddings and heads that layers for further tokens (MTP, NextN) have for themselves.
"""
_HEADS_OF_THEIR_OWN = ("output.weight", "model.output.weight", "language_model.output.weight")
"""InternLM2's: `output` is the name of many modules."""
DRAFT_MAPS = ("d2t", "t2d")
"""EAGLE's: from tokens of a draft model to those of the model that it drafts for, and back."""


def holds_tokens(name: str) -> tuple[Holds, int] | None:
    """What a tensor has an entry for each token of, and along which dimension; None if it is none of those known."""
    if name in _HEADS_OF_THEIR_OWN:
        return "output", 0
    return next((found for end, found in HOLDS.items() if name == end or name.endswith(f".{end}")), None)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token: an input or output embedding."""
    return name.endswith(_VOCABULARY)


def has_rows_of_tokens(name: str) -> bool:
    """Whether a tensor has one row per token, in any layout."""
    return is_vocabulary(name) or name.endswith(_EMBEDDINGS)


def embedding_and_head(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """The names of the input and output embedding in transformers' layout, as far as there are such."""
    names = EMBEDDING.name("hf", 0), HEAD.name("hf", 0)
    return names[0] if names[0] in checkpoint else None, names[1] if names[1] in checkpoint else None


def vocabulary_rows(checkpoint: Checkpoint) -> int | None:
    """The rows of the input embedding, in any layout; None if there is none, or only parts of one."""
    names = [n for n, t in checkpoint.items() if has_rows_of_tokens(n) and len(t.spec.shape) == 2]
    inputs = [n for n in names if not n.endswith(_OUTPUTS)] or names
    same_part = {n.rpartition("/")[0] for n in inputs}
    return checkpoint[inputs[0]].spec.shape[0] if inputs and len(same_part) == 1 else None


def embeddings_and_heads(names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Input embeddings, each with what its output embedding may be called."""
    for name in names:
        for inner, outputs in _PAIRS:
            prefix = name.removesuffix(f"{inner}.weight")
            if prefix != name and (not prefix or prefix.endswith(".")):
                yield name, tuple(f"{prefix}{output}.weight" for output in outputs)
                break
