"""Small LLaMA models as Meta lays them out: folders of `consolidated.NN.pth`, and what such a model computes.

`meta_forward` is written from the formulas of the papers, in Meta's own names and rotary order, so that a conversion
can be held against logits that no converter had a hand in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


def split_axis(name: str, embed_axis: int = 1) -> int | None:
    """The axis along which Meta splits a tensor over parts; None where each part has all of it."""
    if name == "tok_embeddings.weight":
        return embed_axis
    if name.endswith(("norm.weight", "rope.freqs")):
        return None
    return 1 if name.endswith((".wo.weight", ".w2.weight")) else 0


def whole_tensors(
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None,
    ffn_dim: int,
    vocab: int,
    dtype: torch.dtype,
    theta: float = 10000.0,
    seed: int = 0,
    rope_freqs: bool = True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a model by its Meta name, made when asked for; each has its own seed."""
    head_dim = dim // n_heads
    kv_dim = (n_kv_heads or n_heads) * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (vocab, dim),
        "norm.weight": (dim,),
        "output.weight": (vocab, dim),
    }
    for layer in range(n_layers):
        for name, shape in {
            "attention.wq": (dim, dim),
            "attention.wk": (kv_dim, dim),
            "attention.wv": (kv_dim, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (ffn_dim, dim),
            "feed_forward.w2": (dim, ffn_dim),
            "feed_forward.w3": (ffn_dim, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    for index, (name, shape) in enumerate(shapes.items()):
        random = torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
        yield name, (1 + 0.1 * random if len(shape) == 1 else 0.05 * random).to(dtype)
    if rope_freqs:
        yield "rope.freqs", _frequencies(head_dim, theta).to(dtype)


def part_of(
    name: str, tensor: torch.Tensor, part: int, parts: int, *, n_kv_heads: int, embed_axis: int = 1
) -> torch.Tensor:
    """What part number `part` of `parts` holds of a tensor, in memory of its own.

    Where there are more parts than heads of k and v, each part has one whole head, so that heads repeat.
    """
    axis = split_axis(name, embed_axis)
    if axis is None:
        return tensor.clone()
    size = tensor.shape[axis]
    if parts > n_kv_heads and name.endswith((".wk.weight", ".wv.weight")):
        head_dim = size // n_kv_heads
        start, length = part * n_kv_heads // parts * head_dim, head_dim
    else:
        start, length = part * (size // parts), size // parts
        if part == parts - 1:
            length = size - start
    return tensor.narrow(axis, start, length).clone(memory_format=torch.contiguous_format)


def meta_params(
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None,
    ffn_dim: int,
    vocab: int,
    theta: float = 10000.0,
    scaled: bool = False,
    params: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `params.json`; `params` overrides it, and leaves out each key that it gives `...` for."""
    made: dict[str, Any] = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads}
    if n_kv_heads is not None:
        made["n_kv_heads"] = n_kv_heads
    made |= {"norm_eps": 1e-5, "vocab_size": vocab, "multiple_of": 256}
    base = int(8 * dim / 3)
    if 256 * math.ceil(base / 256) != ffn_dim:
        made["multiple_of"] = ffn_dim
        if base > ffn_dim:
            made["ffn_dim_multiplier"] = ffn_dim / base
    if theta != 10000.0:
        made["rope_theta"] = theta
    if scaled:
        made["use_scaled_rope"] = True
    return {key: value for key, value in {**made, **(params or {})}.items() if value is not ...}


def make_meta(
    folder: Path,
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None,
    ffn_dim: int,
    vocab: int,
    parts: int,
    dtype: torch.dtype,
    theta: float = 10000.0,
    scaled: bool = False,
    seed: int = 0,
    embed_axis: int = 1,
    params: Mapping[str, Any] | None = None,
    flat: bool = False,
    tokenizer: bytes | None = None,
    rope_freqs: bool = True,
) -> dict[str, torch.Tensor]:
    """Write a model of random weights as Meta would; returns its tensors, unsplit, by Meta's names.

    `flat`: the tensors of a part are views of one storage, as in files of LLaMA 1. `n_kv_heads` None: as many as
    `n_heads`, and no word of them in `params.json`.
    """
    sizes: dict[str, Any] = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    sizes |= {"ffn_dim": ffn_dim, "vocab": vocab, "theta": theta}
    tensors = dict(whole_tensors(**sizes, dtype=dtype, seed=seed, rope_freqs=rope_freqs))
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        state_dict = {
            name: part_of(name, tensor, part, parts, n_kv_heads=n_kv_heads or n_heads, embed_axis=embed_axis)
            for name, tensor in tensors.items()
        }
        if flat:
            storage = torch.cat([tensor.reshape(-1) for tensor in state_dict.values()])
            pieces = storage.split([tensor.numel() for tensor in state_dict.values()])
            state_dict = {
                name: piece.view(tensor.shape) for (name, tensor), piece in zip(state_dict.items(), pieces, strict=True)
            }
        torch.save(state_dict, folder / f"consolidated.{part:02}.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(**sizes, scaled=scaled, params=params)))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return tensors


def meta_download(folder: Path, **changes: Any) -> None:
    """A small model with a tokenizer and a checklist, as Meta's script leaves it."""
    from small_tokenizers import sentencepiece_model  # which trains one: not for those who only want weights

    sizes = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": None, "ffn_dim": 256, "vocab": 1500, "parts": 1}
    make_meta(folder, **{**sizes, "dtype": torch.float16, "tokenizer": sentencepiece_model(), **changes})
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "checklist.chk").write_text("".join(lines))


def _frequencies(head_dim: int, theta: float, factor: float | None = None) -> torch.Tensor:
    """Angle per position of each rotary pair, [head_dim / 2]; with `factor` rescaled as for Llama 3.1.

    There, wavelengths above 8192 are stretched by `factor`, those under 8192 / 4 are kept, and between the two the
    frequency is blended by how often it turns within 8192 positions.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if factor is None:
        return frequencies
    low, high, original = 1.0, 4.0, 8192
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def _rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the adjacent pairs of `x`, [batch, seq, heads, head_dim], by the complex `turns`, [seq, head_dim / 2]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None, :]).flatten(-2)


def meta_forward(
    tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], ids: Any, factor: float = 8.0
) -> torch.Tensor:
    """Logits in float32, [batch, seq, vocab], for `ids`, [batch, seq] or [seq]; `factor` is for `use_scaled_rope`."""
    ids = torch.as_tensor(ids)
    if ids.ndim == 1:
        ids = ids[None]
    batch, seq = ids.shape
    n_heads = params["n_heads"]
    n_kv_heads = params.get("n_kv_heads") or n_heads
    head_dim = tensors["layers.0.attention.wq.weight"].shape[0] // n_heads

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ tensors[name + ".weight"].float().T

    def rms_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * tensors[name].float()

    theta = float(params.get("rope_theta") or 10000.0)
    frequencies = _frequencies(head_dim, theta, factor if params.get("use_scaled_rope") else None)
    angles = torch.outer(torch.arange(seq, dtype=torch.float32), frequencies)  # [seq, head_dim / 2]
    turns = torch.polar(torch.ones_like(angles), angles)
    mask = torch.full((seq, seq), -math.inf).triu(1)

    h = tensors["tok_embeddings.weight"].float()[ids]  # [batch, seq, dim]
    for layer in range(params["n_layers"]):
        prefix = f"layers.{layer}."
        x = rms_norm(h, prefix + "attention_norm.weight")
        q = _rotate(linear(x, prefix + "attention.wq").view(batch, seq, n_heads, head_dim), turns)
        k = _rotate(linear(x, prefix + "attention.wk").view(batch, seq, n_kv_heads, head_dim), turns)
        v = linear(x, prefix + "attention.wv").view(batch, seq, n_kv_heads, head_dim)
        k, v = (kv.repeat_interleave(n_heads // n_kv_heads, dim=2) for kv in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim) + mask
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, seq, -1)
        h = h + linear(mixed, prefix + "attention.wo")
        x = rms_norm(h, prefix + "ffn_norm.weight")
        gate = F.silu(linear(x, prefix + "feed_forward.w1"))
        h = h + linear(gate * linear(x, prefix + "feed_forward.w3"), prefix + "feed_forward.w2")
    return linear(rms_norm(h, "norm.weight"), "output")
