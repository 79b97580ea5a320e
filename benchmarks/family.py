"""Checkpoint families shaped like LLaMA models, of any size: raw, and tuned a little way from it.

    python benchmarks/family.py 1b /data/family        # /data/family/raw, /data/family/tuned
    python benchmarks/family.py 70b /data/big --sparse # headers and holes: any size, no disk

Written with numpy alone, so that nothing under test makes its own input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA model."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            prefix = f"model.layers.{i}"
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.mlp.gate_proj.weight", (self.ffn, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.ffn, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.ffn)
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        }


SHAPES = {
    "tiny": Shape(64, 2, 172, 4, 4, 320),
    "small": Shape(768, 12, 2048, 12, 12, 32000),
    "1b": Shape(2048, 22, 5632, 32, 4, 32000),
    "3b": Shape(3072, 26, 8192, 24, 8, 64000),
    "13b": Shape(5120, 40, 13824, 40, 40, 32000),
    "70b": Shape(8192, 80, 28672, 64, 8, 32000),
    "wide": Shape(16384, 2, 53248, 128, 8, 262144),
}
_POOL = 1 << 24


class _Values:
    """Normal float16 values in blocks, cut from a pool at random places: as fast as copying."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pool = (self._random.standard_normal(_POOL, dtype=np.float32) * 0.02).astype(np.float16)
        self._steps = (self._random.standard_normal(_POOL, dtype=np.float32) * 0.0005).astype(np.float16)

    def blocks(self, numel: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Raw values and tuned values, at most 4 Mi elements at a time."""
        for start in range(0, numel, 1 << 22):
            count = min(1 << 22, numel - start)
            a, b = self._random.integers(0, _POOL - count, 2)
            raw = self._pool[a : a + count]
            # One float16 step of noise on the bits is as random as an addition and a hundred times as fast.
            tuned = (raw.view(np.int16) + (self._steps[b : b + count].view(np.int16) & 3)).view(np.float16)
            yield raw, tuned


def split(shape: Shape, max_nbytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors in order, in files of at most `max_nbytes`."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, size in shape.tensors():
        nbytes = int(np.prod(size)) * 2
        if used + nbytes > max_nbytes and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append((name, size))
        used += nbytes
    return shards


def header(tensors: list[tuple[str, tuple[int, ...]]], dtype: str = "F16") -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, size in tensors:
        end = position + int(np.prod(size)) * 2
        entries[name] = {"dtype": dtype, "shape": size, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make(shape: Shape, folder: Path, *, max_shard_nbytes: int = 500_000_000, sparse: bool = False) -> None:
    """Write `folder/raw` and `folder/tuned`."""
    shards = split(shape, max_shard_nbytes)
    values = None if sparse else _Values(0)
    sides = [folder / "raw", folder / "tuned"]
    weight_map, total = {}, 0
    for side in sides:
        side.mkdir(parents=True, exist_ok=True)
        (side / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = sorted(tensors)
        files = [(side / name).open("wb") for side in sides]
        for file in files:
            file.write(header(tensors))
        for tensor, size in tensors:
            numel = int(np.prod(size))
            weight_map[tensor] = name
            total += numel * 2
            if values is None:
                for file in files:
                    file.truncate(file.seek(numel * 2, 1))
                continue
            for block in values.blocks(numel):
                for file, data in zip(files, block, strict=True):
                    file.write(memoryview(data))
        for file in files:
            file.close()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for side in sides:
            (side / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-shard-nbytes", type=int, default=500_000_000)
    parser.add_argument("--sparse", action="store_true", help="holes instead of values")
    options = parser.parse_args()
    make(SHAPES[options.size], options.folder, max_shard_nbytes=options.max_shard_nbytes, sparse=options.sparse)


if __name__ == "__main__":
    main()
