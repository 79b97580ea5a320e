"""Norms folded into what follows them: the weights of an RMS norm become columns' factors of all that reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.layouts.experts import parts_of
from weightops.layouts.parts import is_mtp
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.linear import Along, wide
from weightops.ops.measures.loss import counted_cast
from weightops.ops.rows import Repeat

_READERS: Mapping[str, str] = {
    "input_layernorm": r"self_attn\.(?:q|k|v|qkv|q_a)_proj\.weight|self_attn\.kv_a_proj_with_mqa\.weight",
    "post_attention_layernorm": r"(?:mlp|block_sparse_moe|feed_forward)\."
    r"(?:(?:(?:shared_experts?|shared_mlp|experts\.\d+)\.)?(?:gate|up|gate_up)_proj|gate|router|shared_expert_gate"
    r"|experts\.\d+\.w[13])\.weight",
}
"""By the last part of a norm's name, what reads it in the same layer."""
_BLOCKS: Mapping[str, str] = {
    "input_layernorm": "self_attn|linear_attn|mamba",
    "post_attention_layernorm": "mlp|block_sparse_moe|feed_forward",
}
_WITHIN = re.compile(r".+\.(?:(?:o|down|q_b|kv_b)_proj|experts\.\d+\.w2)\.weight|.+bias")
"""Of blocks, what reads something else than the norm before them."""
_IN_RESIDUAL = ("minimax",)
"""Models whose residual is what the norm gave, by model_type: it has no other place."""
_OTHER_HEADS = ("score.", "classifier.", "v_head.")
_SHIFTED = re.compile(r"gemma|gemma2|gemma3(_text)?|recurrent_gemma|qwen3_next|qwen3_5(_moe)?(_text)?|nemotron")
"""Models that keep a norm's weight less 1, by model_type. Gemma 3n and 4 do not."""
_POST_NORMED = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Where a layer has one of these, `post_attention_layernorm` follows attention, and no matrix reads it."""
_LAYER = re.compile(r"(?P<layer>.*\.layers\.\d+\.)(?P<norm>[a-z_]+)\.weight")
_FINAL = re.compile(r"(?P<before>(?:.*\.)?)model\.norm\.weight|(?P<whole>(?:.*\.)?)model\.language_model\.norm\.weight")


def folded(
    norms: Sequence[str], tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], notes: list[str]
) -> dict[str, LazyTensor]:
    """The norms as ones, and all that reads them with its columns times what they were; float32, one rounding.

    Exact in real numbers; in 16 bits each product is rounded, which is counted. Raises `UsageError` for norms that are
    not known, that nothing reads alone (post-norms), that have a bias, and for a final norm whose head is tied.
    """
    kinds = [str(part.get("model_type")) for part in parts_of(config)]
    shift = 1.0 if _SHIFTED.fullmatch(kinds[-1]) else 0.0
    found: dict[str, LazyTensor] = {}
    for name in norms:
        norm = tensors[name]
        bias = f"{name.removesuffix('.weight')}.bias"
        if bias in tensors or len(norm.spec.shape) != 1:
            raise UsageError(
                f"{escape(name)} is no RMS norm: it has a bias or is no vector", hint="LayerNorm is not folded"
            )
        for reader in _readers(name, tensors, config):
            weight = found.get(reader, tensors[reader])
            if len(weight.spec.shape) != 2 or weight.spec.dtype.is_packed or weight.spec.dtype.bits < 16:
                raise UsageError(
                    f"{escape(reader)} is {weight.spec}, into which {escape(name)} is not folded",
                    hint="weightops dequantize makes plain weights of it, weightops experts single matrices",
                )
            values = wide(weight)
            scaled = LazyTensor.make(Along(1, shift), values, cast(wide(norm), values.spec.dtype))
            found[reader] = counted_cast(scaled, weight.spec.dtype, reader)
        ones = cast(
            LazyTensor.make(Repeat(values.spec.dtype, norm.spec.shape, _one(values, 1.0 - shift))), norm.spec.dtype
        )
        found[name] = ones
    if shift:
        notes.append(f"fold: {kinds[-1]} keeps norms less 1: w + 1 is folded, and 0 is left")
    return found


def _one(values: LazyTensor, number: float) -> bytes:
    import numpy as np

    return np.array([number], values.spec.dtype.value).tobytes()


def _readers(name: str, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> list[str]:
    """All that reads a norm."""
    final, layer = _FINAL.fullmatch(name), _LAYER.fullmatch(name)
    if final is not None:
        return _heads(name, tensors, config)
    if layer is None or layer["norm"] not in _READERS:
        raise UsageError(
            f"{escape(name)} is no norm whose readers are known",
            hint=f"known are {', '.join(_READERS)} and model.norm",
        )
    post_normed = any(f"{layer['layer']}{other}.weight" in tensors for other in _POST_NORMED)
    if post_normed and layer["norm"] == "post_attention_layernorm":
        raise UsageError(f"{escape(name)} follows attention: what reads it is a sum, into which nothing is folded")
    if str(parts_of(config)[-1].get("model_type")) in _IN_RESIDUAL:
        raise UsageError(f"{escape(name)} is part of the residual in this model, which cannot be folded")
    pattern = re.compile(re.escape(layer["layer"]) + f"(?:{_READERS[layer['norm']]})")
    readers = [n for n in tensors if pattern.fullmatch(n)]
    _refuse_others(name, layer["layer"], layer["norm"], readers, tensors)
    return readers


def _heads(name: str, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> list[str]:
    """What reads the final norm."""
    tied = any(part.get("tie_word_embeddings") is True for part in parts_of(config))
    heads = [n for n in tensors if n.endswith(("lm_head.weight", "embed_out.weight"))]
    if tied or not heads:
        raise UsageError(
            f"{escape(name)}: the head is the embedding, which would be folded too",
            hint="weightops shard --untie writes a head of its own",
        )
    further = next(filter(is_mtp(config), tensors), None)
    other = next((n for n in tensors if n.startswith(_OTHER_HEADS)), further)
    if other is not None:
        hint = "weightops part --drop mtp leaves such layers out" if other == further else None
        raise UsageError(f"{escape(name)} is read by the head, and by what {escape(other)} is part of", hint=hint)
    return heads


def _refuse_others(name: str, layer: str, norm: str, readers: Sequence[str], tensors: Mapping[str, LazyTensor]) -> None:
    """Raise `UsageError` for a norm without readers, and unless all else in its layer is known not to read it."""
    own = re.compile(re.escape(layer) + f"(?:{_BLOCKS[norm]})\\.")
    known = re.compile(re.escape(layer) + f"(?:{'|'.join(_BLOCKS.values())})\\.")
    for other, tensor in tensors.items():
        if not other.startswith(layer) or len(tensor.spec.shape) < 2 or other in readers or _WITHIN.fullmatch(other):
            continue
        if own.match(other) or not known.match(other):
            raise UsageError(
                f"{escape(name)}: whether {escape(other)} reads it is not known",
                hint="weightops experts --layout separate takes stacks apart; scale does it step by step",
            )
    parallel = norm == "input_layernorm" and not any(
        f"{layer}{each}.weight" in tensors for each in ("post_attention_layernorm", "pre_feedforward_layernorm")
    )
    if not readers or parallel:
        why = "the layer's blocks are parallel, and both read it" if readers else "what reads it is not known"
        raise UsageError(f"{escape(name)}: {why}", hint="scale does it step by step")
