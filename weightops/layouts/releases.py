"""What Meta's and Mistral's files leave unsaid of their own releases: context length, rope factor, tied embeddings.

A release is known by numbers that its files do say. Source: the parameters and Hugging Face configs published with
each release.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightops.layouts.model import Hyperparameters


@dataclass(frozen=True, slots=True)
class Release:
    """A published model; `rope_factor` is set where its frequencies are rescaled."""

    name: str
    dim: int
    n_layers: int
    n_kv_heads: int
    rope_theta: float
    context_length: int
    rope_factor: float | None = None
    tied: bool = False
    family: str = "llama"
    head_dim: int = 128


RELEASES = (
    Release("LLaMA 7B", 4096, 32, 32, 1e4, 2048),
    Release("LLaMA 13B", 5120, 40, 40, 1e4, 2048),
    Release("LLaMA 30B", 6656, 60, 52, 1e4, 2048),
    Release("LLaMA 65B", 8192, 80, 64, 1e4, 2048),
    Release("Llama 2 7B", 4096, 32, 32, 1e4, 4096),
    Release("Llama 2 13B", 5120, 40, 40, 1e4, 4096),
    Release("Llama 2 70B", 8192, 80, 8, 1e4, 4096),
    Release("Code Llama 7B", 4096, 32, 32, 1e6, 16384),
    Release("Code Llama 13B", 5120, 40, 40, 1e6, 16384),
    Release("Code Llama 34B", 8192, 48, 8, 1e6, 16384),
    Release("Code Llama 70B", 8192, 80, 8, 1e6, 16384),
    Release("Llama 3 8B", 4096, 32, 8, 5e5, 8192),
    Release("Llama 3 70B", 8192, 80, 8, 5e5, 8192),
    Release("Llama 3.1 8B", 4096, 32, 8, 5e5, 131072, 8.0),
    Release("Llama 3.1 or 3.3 70B", 8192, 80, 8, 5e5, 131072, 8.0),
    Release("Llama 3.1 405B", 16384, 126, 8, 5e5, 131072, 8.0),
    Release("Llama 3.2 1B", 2048, 16, 8, 5e5, 131072, 32.0, True, head_dim=64),
    Release("Llama 3.2 3B", 3072, 28, 8, 5e5, 131072, 32.0, True),
    Release("Mistral 7B v0.1", 4096, 32, 8, 1e4, 32768, family="mistral"),
    Release("Mistral 7B v0.2 or v0.3", 4096, 32, 8, 1e6, 32768, family="mistral"),
    Release("Mistral Nemo", 5120, 40, 8, 1e6, 131072, family="mistral"),
    Release("Mistral Nemo as first published", 5120, 40, 8, 1e6, 1024000, family="mistral"),
)


def candidates(h: Hyperparameters, scaled: bool) -> tuple[Release, ...]:
    """The releases that these parameters may be of."""
    wanted = (h.family, h.dim, h.n_layers, h.n_kv_heads, h.head_dim, h.rope_theta, scaled)
    return tuple(
        r
        for r in RELEASES
        if (r.family, r.dim, r.n_layers, r.n_kv_heads, r.head_dim, r.rope_theta, r.rope_factor is not None) == wanted
    )
