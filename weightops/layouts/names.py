"""What each layout calls the tensors of a LLaMA model, and what shapes they have.

Sources: transformers 4.47's convert_llama_weights_to_hf, TencentPretrain's convert_llama_to_tencentpretrain,
llama_inference's model, llama.cpp's gguf constants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.model import Hyperparameters
from weightops.lazy import LazyTensor

LAYOUTS = ("hf", "meta", "tencentpretrain", "llama_inference", "gguf")
Split = Literal["rows", "columns", "copies"]


@dataclass(frozen=True, slots=True)
class Role:
    """A tensor of the model, or with `{n}` in its names one of each layer.

    `names` are those in the order of `LAYOUTS`; the weights lack `.weight`. `rotary` tells whose heads its rows are:
    such rows come in two orders. `split` is how Meta cuts it into parts.
    """

    names: tuple[str, str, str, str, str]
    split: Split
    rotary: Literal["q", "k"] | None = None

    def name(self, layout: str, layer: int, kind: str = "weight") -> str:
        return f"{self.names[LAYOUTS.index(layout)].format(n=layer)}.{kind}"


_BLOCK = ("model.layers.{n}.", "layers.{n}.", "encoder.transformer.{n}.", "encoder.transformer.{n}.", "blk.{n}.")


def _layer(hf: str, meta: str, tencent: str, gguf: str, split: Split, rotary: Literal["q", "k"] | None = None) -> Role:
    hf, meta, one, other, ggml = map(str.__add__, _BLOCK, (hf, meta, tencent, tencent, gguf))
    return Role((hf, meta, one, other, ggml), split, rotary)


EMBEDDING = Role(
    ("model.embed_tokens", "tok_embeddings", "embedding.word.embedding", "embedding.embedding", "token_embd"), "columns"
)
LAYER = (
    _layer("self_attn.q_proj", "attention.wq", "self_attn.linear_layers.0", "attn_q", "rows", "q"),
    _layer("self_attn.k_proj", "attention.wk", "self_attn.linear_layers.1", "attn_k", "rows", "k"),
    _layer("self_attn.v_proj", "attention.wv", "self_attn.linear_layers.2", "attn_v", "rows"),
    _layer("self_attn.o_proj", "attention.wo", "self_attn.final_linear", "attn_output", "columns"),
    _layer("mlp.gate_proj", "feed_forward.w1", "feed_forward.linear_gate", "ffn_gate", "rows"),
    _layer("mlp.up_proj", "feed_forward.w3", "feed_forward.linear_1", "ffn_up", "rows"),
    _layer("mlp.down_proj", "feed_forward.w2", "feed_forward.linear_2", "ffn_down", "columns"),
    _layer("input_layernorm", "attention_norm", "layer_norm_1", "attn_norm", "copies"),
    _layer("post_attention_layernorm", "ffn_norm", "layer_norm_2", "ffn_norm", "copies"),
)
PROJECTIONS = LAYER[:7]
"""The linear layers: where biases may be."""
NORM = Role(("model.norm", "norm", "encoder.layer_norm", "encoder.layer_norm", "output_norm"), "copies")
HEAD = Role(("lm_head", "output", "target.lm.output_layer", "target.lm", "output"), "rows")
_DERIVED = re.compile(r"rope\.freqs|(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|rope_freqs\.weight")


def roles(n_layers: int, tied: bool = False) -> Iterator[tuple[Role, int]]:
    """Every tensor's role and layer, in the order of transformers' state dict; made one by one, for any `n_layers`."""
    yield EMBEDDING, 0
    for n in range(n_layers):
        for role in LAYER:
            yield role, n
    yield NORM, 0
    if not tied:
        yield HEAD, 0


def find_layout(names: Iterable[str]) -> str | None:
    """The layout whose name for the embedding is there."""
    present = {name.rpartition("/")[2] for name in names}
    return next((layout for layout in LAYOUTS if EMBEDDING.name(layout, 0) in present), None)


def count_layers(layout: str, names: Iterable[str]) -> int:
    """One more than the highest number of a layer."""
    pattern = re.compile(re.escape(LAYER[0].names[LAYOUTS.index(layout)]).replace(r"\{n\}", r"(\d{1,9})") + r"\.weight")
    return max((int(m[1]) + 1 for name in names if (m := pattern.fullmatch(name))), default=0)


def is_derived(name: str) -> bool:
    """Whether a tensor follows from the parameters, and any reader computes it anew."""
    return _DERIVED.fullmatch(name) is not None


def shape_of(role: Role, h: Hyperparameters, kind: str = "weight") -> tuple[int, ...]:
    """The shape of a role's weight or bias: out x in, as torch.nn.Linear has it."""
    q, kv = h.n_heads * h.head_dim, h.n_kv_heads * h.head_dim
    q_, k_, v_, o_, gate, up, down, *_ = LAYER
    shapes: dict[Role, tuple[int, ...]] = {
        EMBEDDING: (h.vocab_size, h.dim),
        HEAD: (h.vocab_size, h.dim),
        **{q_: (q, h.dim), k_: (kv, h.dim), v_: (kv, h.dim), o_: (h.dim, q)},
        **{gate: (h.ffn_dim, h.dim), up: (h.ffn_dim, h.dim), down: (h.dim, h.ffn_dim)},
    }
    shape = shapes.get(role, (h.dim,))
    return shape[:1] if kind == "bias" else shape


def to_canonical(
    layout: str, tensors: Mapping[str, LazyTensor], h: Hyperparameters, where: str
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors under canonical names, and the reason for each that is left out; the rotary order stays as it is.

    Raises `CorruptInput` for heads that do not fit one another, a tensor that is missing or has another shape than the
    parameters say, `UsageError` for one that is no part of a LLaMA model or holds no floating-point numbers.
    """
    if h.head_dim % 2 or not h.n_kv_heads or h.n_heads % h.n_kv_heads:
        raise CorruptInput(
            f"{where}: {h.n_heads} heads of q and {h.n_kv_heads} of k, each of {h.head_dim} rows, make no LLaMA model",
            hint="heads of k must divide those of q, and rotary embeddings need pairs of rows",
        )
    found: dict[str, LazyTensor] = {}
    used: set[str] = set()
    dropped: dict[str, str] = {}
    for role, layer in roles(h.n_layers, h.tied):
        for kind in ("weight", "bias") if role in PROJECTIONS else ("weight",):
            name = role.name(layout, layer, kind)
            if name not in tensors:
                if kind == "weight":
                    raise CorruptInput(f"{where}: {escape(name)} is missing", hint="is a file of the model missing?")
                continue
            shape, expected = tensors[name].spec.shape, shape_of(role, h, kind)
            if shape != expected:
                raise CorruptInput(
                    f"{where}: {escape(name)} is {list(shape)}, the parameters say {list(expected)}",
                    hint="are all files of the model there, and its parameters its own?",
                )
            if not tensors[name].spec.dtype.is_float:
                raise UsageError(
                    f"{where}: {escape(name)} is {tensors[name].spec}, weights are floating-point numbers",
                    hint="quantised models are not converted",
                )
            found[role.name("meta", layer, kind)] = tensors[name]
            used.add(name)
    for name in tensors.keys() - used:
        if is_derived(name):
            dropped[name] = "follows from the parameters, and is computed by whoever loads the model"
        elif h.tied and name == HEAD.name(layout, 0):
            dropped[name] = "tied to the embedding, which holds the same"
    unknown = sorted(tensors.keys() - used - dropped.keys())
    if unknown:
        raise UsageError(
            f"{where}: {escape(unknown[0])} is no tensor of a LLaMA model"
            + (f", and so are {len(unknown) - 1} more" if len(unknown) > 1 else ""),
            hint="mixtures of experts, vision and other architectures are not converted",
        )
    return found, dropped


def from_canonical(layout: str, tensors: Mapping[str, LazyTensor], h: Hyperparameters) -> dict[str, LazyTensor]:
    """Tensors under a layout's names, in the order of its state dict; the rotary order stays as it is."""
    return {
        role.name(layout, layer, kind): tensors[name]
        for role, layer in roles(h.n_layers, h.tied)
        for kind in ("weight", "bias")
        if (name := role.name("meta", layer, kind)) in tensors
    }
