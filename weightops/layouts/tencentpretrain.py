"""TencentPretrain's layout, and llama_inference's, whose names of embedding and head differ: Meta's rotary order.

Source: TencentPretrain's scripts/convert_llama_*.py and models/llama/*_config.json.
"""

from __future__ import annotations

from typing import Any

from weightops.checkpoint import Checkpoint, Sidecar, Written, written_json
from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.model import Hyperparameters, Model
from weightops.layouts.names import EMBEDDING, LAYER, count_layers, from_canonical, to_canonical
from weightops.layouts.releases import RELEASES
from weightops.layouts.source import Fields, Source

CONFIG = "config.json"
_DECISIVE = (
    *("emb_size", "hidden_size", "feedforward_size", "layers_num", "hidden_act", "rotary_position_embedding"),
    *("encoder", "feed_forward", "mask", "layernorm_positioning", "layernorm"),
)
"""The fields that say what is computed, beside those that are read one by one."""


def read(source: Source, layout: str) -> Model:
    """The model.

    Raises `UsageError` for what neither its files nor the settings say, `CorruptInput` if config and tensors disagree.
    """
    tensors, where = source.checkpoint, source.where
    config = source.json(CONFIG) or {}
    fields = Fields(config, f"{where}/{CONFIG}")
    embedding, n_layers = tensors.get(EMBEDDING.name(layout, 0)), count_layers(layout, tensors)
    q, k, gate = (tensors.get(LAYER[i].name(layout, 0)) for i in (0, 1, 4))
    if embedding is None or q is None or k is None or gate is None or not n_layers:
        raise CorruptInput(f"{where}: the embedding or the first layer is missing")
    for tensor in (embedding, q, k, gate):
        if len(tensor.spec.shape) != 2:
            raise CorruptInput(f"{where}: {tensor.spec} is no matrix, where one is expected")
    vocab_size, dim = embedding.spec.shape
    n_heads = source.setting("n_heads", config.get("heads_num"))
    notes = []
    if n_heads is None:
        alike = [r for r in RELEASES if (r.dim, r.n_layers, r.family) == (dim, n_layers, "llama")]
        known = {dim // r.head_dim for r in alike}
        if len(known) != 1:
            raise UsageError(f"{where}: no file says how many heads q has", hint="give --set n_heads=N")
        n_heads = known.pop()
        notes.append(f"{n_heads} heads: those of LLaMA with {n_layers} layers of {dim}")
    n_heads = Fields({"heads_num": n_heads}, fields.where).count("heads_num")
    head_dim, odd = divmod(q.spec.shape[0], n_heads)
    if odd or not head_dim or k.spec.shape[0] % head_dim or head_dim % 2:
        raise CorruptInput(f"{where}: {n_heads} heads do not fit q {q.spec} and k {k.spec}")
    stated = config.get("local_kv_heads_num", config.get("local_kv_head_num"))
    if stated not in (None, k.spec.shape[0] // head_dim):
        raise CorruptInput(f"{where}: k {k.spec} does not have the {escape(str(stated))[:40]} heads of its config")
    norm_eps, theta, context = (
        source.setting(name, None if fields.get(key) is None else take(key))
        for name, key, take in (
            ("norm_eps", "layernorm_eps", fields.number),
            ("rope_theta", "rope_theta", fields.number),
            ("context_length", "max_seq_length", fields.count),
        )
    )
    if norm_eps is None:
        raise UsageError(
            f"{where}: no file gives the epsilon of its norms",
            hint="give --set norm_eps=X (LLaMA 7B and 13B: 1e-6, LLaMA 30B and later ones: 1e-5)",
        )
    if theta is None:
        theta = 10000.0
        notes.append("rope_theta 10000: TencentPretrain knows no other")
    hyperparameters = Hyperparameters(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=k.spec.shape[0] // head_dim,
        head_dim=head_dim,
        ffn_dim=gate.spec.shape[0],
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        rope_theta=theta,
        context_length=context,
    )
    expected = {key: value for key, value in config_of(hyperparameters).items() if key in _DECISIVE}
    expected["attention_head_size"] = head_dim
    for key, value in expected.items():
        if (found := config.get(key, value)) != value:
            raise CorruptInput(
                f"{fields.where}: {key} is {escape(repr(found))[:80]}, a LLaMA model of these tensors has {value}",
                hint="is a file of the model missing, or is it of another architecture?",
            )
    canonical, dropped = to_canonical(layout, tensors, hyperparameters, where)
    return Model(
        name=source.checkpoint.name,
        hyperparameters=hyperparameters,
        tensors=canonical,
        dropped=dropped,
        notes=tuple(notes),
    )


def write(model: Model, layout: str) -> Checkpoint:
    """The model in one file, or in blocks with an index; raises `UsageError` for what the layout has no place for."""
    h = model.hyperparameters
    odd = next((name for name in model.tensors if name.endswith(".bias")), None)
    if odd is not None or h.rope_scaling is not None or h.sliding_window is not None or h.tied:
        what = (
            escape(odd) if odd else "rope scaling" if h.rope_scaling else "a sliding window" if h.sliding_window else ""
        )
        raise UsageError(f"{escape(model.name)}: {what or 'a tied head'} has no place in TencentPretrain's layout")
    sidecars: dict[str, Sidecar] = {CONFIG: written_json(config_of(h)), **model.sidecars}
    if model.tokenizer is not None:
        sidecars["tokenizer.model"] = Written(model.tokenizer.data)
    tensors = from_canonical(layout, model.tensors, h)
    container = "tencentpretrain" if layout == "tencentpretrain" else "torch"
    return Checkpoint(model.name, tensors, sidecars=sidecars, container=container)


def config_of(h: Hyperparameters) -> dict[str, Any]:
    """The fields of TencentPretrain's models/llama/*_config.json."""
    config = {
        "emb_size": h.dim,
        "feedforward_size": h.ffn_dim,
        "hidden_size": h.dim,
        "hidden_act": "silu",
        "heads_num": h.n_heads,
        "layers_num": h.n_layers,
        "dropout": 0.0,
        "data_processor": "lm",
        "embedding": ["word"],
        "remove_transformer_bias": True,
        "remove_embedding_layernorm": True,
        "rotary_position_embedding": True,
        "encoder": "transformer",
        "feed_forward": "gated",
        "mask": "causal",
        "layernorm_positioning": "pre",
        "layernorm": "rms",
        "layernorm_eps": h.norm_eps,
        "rope_theta": h.rope_theta,
        "target": ["lm"],
    }
    if h.head_dim * h.n_heads != h.dim:
        config["attention_head_size"] = h.head_dim
    if h.n_kv_heads != h.n_heads:
        config["local_kv_heads_num"] = h.n_kv_heads
    if h.context_length is not None:
        config["max_seq_length"] = h.context_length
    return config
