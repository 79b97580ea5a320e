"""A LLaMA model apart from any layout: parameters, tensors under canonical names, tokenizer.

Canonical are Meta's names and Meta's rotary order (rows of q and k in adjacent pairs), without parts. Every layout
reads into a `Model` and writes from one, so none knows another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from weightops.checkpoint import Sidecar
from weightops.errors import UsageError
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.layouts.tokenizers.tokens import Tokenizer
from weightops.lazy import LazyTensor


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rescaling of rotary frequencies (`rope_type` llama3 in transformers)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a LLaMA model is beside its weights. `context_length` is None where no file says it."""

    family: Literal["llama", "mistral"] = "llama"
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    context_length: int | None = None
    sliding_window: int | None = None
    tied: bool = False

    def known_context_length(self) -> int:
        """The context length; raises `UsageError` where no file says it."""
        if self.context_length is None:
            raise UsageError(
                "no file says for how long a context the model was trained",
                hint="give --set context_length=N (LLaMA: 2048, Llama 2: 4096, Code Llama: 16384, Llama 3: 8192)",
            )
        return self.context_length


@dataclass(frozen=True, kw_only=True)
class Model:
    """A LLaMA model. `name` is that of its folder; `dropped` gives the reason for each tensor that is not taken."""

    name: str
    hyperparameters: Hyperparameters
    tensors: Mapping[str, LazyTensor]
    tokenizer: Tokenizer | None = None
    """None without one, and where a layout takes `files` as they are."""
    files: TokenizerFiles = field(default_factory=TokenizerFiles)
    """Those that say what the tokenizer is, where they lie beside the weights."""
    n_tokens: int | None = None
    """Tokens that have a row in the embedding; None without a tokenizer."""
    sidecars: Mapping[str, Sidecar] = field(default_factory=dict)
    """Files that go along as they are."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What was derived rather than read, and from what."""
