"""Small models quantised to the nearest integers, with the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from support import given_tensor

import weightops
from weightops.checkpoint import Checkpoint, written_json
from weightops.formats.quantized.gptq import CONFIG_KEY, CONFIG_NAME, CheckpointFormat, QuantizeConfig, write_module

QUANTISED = ("_proj", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The ends of the names of the layers that are quantised, in LLaMA and BLOOM."""


@dataclass(frozen=True)
class Scheme:
    """How to quantise. `shuffled`: columns belong to groups in no order. `ends`: some outputs are all above or all
    below zero, so that their zero points are the least and the greatest that there are."""

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    checkpoint_format: CheckpointFormat = "gptq"
    shuffled: bool = False
    ends: bool = False

    @property
    def config(self) -> QuantizeConfig:
        return QuantizeConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            desc_act=self.shuffled,
            checkpoint_format=self.checkpoint_format,
            damp_percent=0.01,
            meta={"quantizer": ["weightops:test"]},
        )


@dataclass(frozen=True)
class Rounded:
    """A layer in integers; `weight` [N, K] is what they stand for, in float64."""

    q: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    g_idx: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        scales, zeros = (a.astype(np.float64)[self.g_idx] for a in (self.scales, self.zeros))
        return (scales * (self.q - zeros)).T


def rounded(weight: np.ndarray, scheme: Scheme, seed: int = 0) -> Rounded:
    """A weight [N, K] rounded to the nearest point of the grid of its group."""
    columns, size = weight.shape[1], scheme.group_size if scheme.group_size > 0 else weight.shape[1]
    g_idx = (np.arange(columns) // size).astype(np.int32)
    if scheme.shuffled:
        g_idx = np.random.default_rng(seed).permutation(g_idx).astype(np.int32)
    groups, top = int(g_idx.max()) + 1, (1 << scheme.bits) - 1
    low = np.stack([np.minimum(weight[:, g_idx == g].min(axis=1), 0) for g in range(groups)])
    high = np.stack([np.maximum(weight[:, g_idx == g].max(axis=1), 0) for g in range(groups)])
    if scheme.sym:
        high = np.maximum(high, -low)
        low = -high
    scales = np.maximum((high - low) / top, 1e-4).astype(np.float16)
    least = 1 if scheme.checkpoint_format == "gptq" else 0
    zeros = np.clip(np.round(-low / scales), least, top).astype(np.uint8)
    if scheme.sym:
        zeros[:] = 1 << scheme.bits - 1
    wide = scales.astype(np.float64)[g_idx]
    q = np.clip(np.round(weight.T / wide) + zeros[g_idx], 0, top).astype(np.uint8)
    return Rounded(q, zeros, scales, g_idx)


def llama(seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).half().eval()


def bloom(seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2)
    model = transformers.BloomForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.half().eval()


@dataclass(frozen=True)
class Quantised:
    """A model of transformers with its layers rounded: what is stored, and the same as plain weights in float64."""

    state: Mapping[str, torch.Tensor]
    weights: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    scheme: Scheme

    @property
    def checkpoint(self) -> Checkpoint:
        document = self.scheme.config.to_json()
        files = {
            "config.json": written_json({**self.config, CONFIG_KEY: document}),
            CONFIG_NAME: written_json(document),
        }
        return Checkpoint("model", {name: given_tensor(t) for name, t in self.state.items()}, files)

    def save(self, folder: Path, max_shard_size: str | int = "5GB", **output: Any) -> Path:
        weightops.save(self.checkpoint, folder, max_shard_size=max_shard_size, **output)
        return folder

    def plain(self) -> transformers.PreTrainedModel:
        """The model in float32, with the weights that the integers stand for."""
        config = transformers.AutoConfig.for_model(**self.config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = {n: t.float() for n, t in self.state.items() if n.rpartition(".")[0] + ".weight" not in self.weights}
        state |= {n: t.float() for n, t in self.state.items() if n.endswith(".bias")}
        state |= {name: torch.from_numpy(weight).float() for name, weight in self.weights.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert (unexpected, set(missing) - {"lm_head.weight"}) == ([], set())
        model.tie_weights()
        return model.eval()


def quantised(model: transformers.PreTrainedModel, scheme: Scheme) -> Quantised:
    """A model with its layers rounded to the nearest, its other tensors as they are."""
    state: dict[str, torch.Tensor] = {}
    weights: dict[str, np.ndarray] = {}
    plain = model.state_dict()
    for number, (name, tensor) in enumerate(plain.items()):
        prefix, _, part = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if not prefix.endswith(QUANTISED):
            state[name] = tensor
        elif part == "weight":
            weight = tensor.double().numpy().copy()
            if scheme.ends:
                weight[:8] = np.abs(weight[:8])
                weight[-8:] = -np.abs(weight[-8:])
            made = rounded(weight, scheme, seed=number)
            bias = plain.get(f"{prefix}.bias")
            parts = write_module(
                prefix,
                made.q,
                made.zeros,
                made.scales,
                made.g_idx,
                bias.numpy() if bias is not None else None,
                scheme.bits,
                scheme.checkpoint_format,
            )
            state |= {full: torch.from_numpy(array) for full, array in parts.items()}
            weights[name] = made.weight
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {k: v for k, v in config.items() if v is not None} | {"torch_dtype": "float16"}
    config.pop("dtype", None)
    return Quantised(state, weights, config, scheme)


def without(found: Quantised, *suffixes: str) -> Quantised:
    """The same without the tensors whose names end so."""
    return replace(found, state={n: t for n, t in found.state.items() if not n.endswith(suffixes)})
