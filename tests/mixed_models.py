"""Models that are only names, shapes and hyperparameters, for what chooses types by those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from weightops.layouts.ggml_mix import MixModel
from weightops.spec import DType, TensorSpec


@dataclass(frozen=True)
class MixedModel:
    """GGUF's names and shapes, and what else the types hang on."""

    facts: MixModel
    tensors: dict[str, TensorSpec]


def mixed_model(facts: MixModel, *, width: int = 256, hidden: int = 512, tied: bool = False) -> MixedModel:
    """One of float16, with what Falcon has, and experts, where the model has them; and a few odd tensors."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (64, width)
    for layer in range(facts.layers):
        parts: dict[str, tuple[int, ...]] = {"attn_norm.weight": (width,), "attn_output.weight": (width, width)}
        if facts.architecture == "falcon":
            parts["attn_qkv.weight"] = (width + 128, width)
        else:
            parts |= {f"attn_{part}.weight": (width, width) for part in "qkv"}
        if facts.experts:
            parts |= {f"ffn_{part}_exps.weight": (facts.experts, hidden, width) for part in ("gate", "up")}
            parts |= {"ffn_down_exps.weight": (facts.experts, width, hidden), "ffn_down_shexp.weight": (width, hidden)}
            parts["ffn_gate_inp.weight"] = (facts.experts, width)
        else:
            parts |= {"ffn_gate.weight": (hidden, width), "ffn_up.weight": (hidden, width)}
            parts["ffn_down.weight"] = (width, hidden)
        if layer % 5 == 1:
            parts |= {"attn_kv_b.weight": (width, width), "ssm_conv1d.weight": (width, width), "odd.weight": (1, width)}
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
    kinds = {name: DType.F32 if len(shape) == 1 else DType.F16 for name, shape in shapes.items()}
    return MixedModel(facts, {name: TensorSpec(kinds[name], shape) for name, shape in shapes.items()})


SMALL = mixed_model(MixModel(architecture="llama", layers=11, heads=8, kv_heads=2))


def random_models(random: np.random.Generator) -> Iterator[MixedModel]:
    """Models of every kind that some rule speaks of."""
    for architecture in ("llama", "qwen2", "falcon"):
        for layers in (1, 2, 7, 16, 32, 33, 80):
            for experts in (0, 4, 8) if architecture == "llama" and layers < 80 else (0,):
                heads, kv_heads = [(8, 8), (8, 4), (8, 2), (8, 1)][random.integers(4)]
                facts = MixModel(
                    architecture=architecture, layers=layers, heads=heads, kv_heads=kv_heads, experts=experts
                )
                width, hidden = random.choice([256, 256, 512, 320, 264]), random.choice([512, 256, 352, 520])
                yield mixed_model(facts, width=int(width), hidden=int(hidden), tied=bool(random.random() < 0.3))


def write_header(path: Path, model: MixedModel) -> None:
    """A GGUF file of the model, whose weights are a hole."""
    writer, facts = gguf.GGUFWriter(path, model.facts.architecture), model.facts
    writer.add_context_length(128)
    writer.add_embedding_length(model.tensors["token_embd.weight"].shape[1])
    writer.add_feed_forward_length(512)
    writer.add_block_count(facts.layers)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_vocab_size(64)
    (writer.add_layer_norm_eps if facts.architecture == "falcon" else writer.add_layer_norm_rms_eps)(1e-5)
    if facts.experts:
        writer.add_expert_count(facts.experts)
        writer.add_expert_used_count(2)
    nbytes = 0
    for name, spec in model.tensors.items():
        kind = gguf.GGMLQuantizationType[spec.dtype.name]
        writer.add_tensor_info(name, spec.shape, np.dtype(spec.dtype.value), spec.nbytes, kind)
        nbytes += -(-spec.nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + nbytes)
