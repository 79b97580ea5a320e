"""Input and output embeddings, whatever a layout calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from weightops.checkpoint import Checkpoint
from weightops.layouts.names import EMBEDDING, HEAD

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
