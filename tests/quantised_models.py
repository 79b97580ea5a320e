"""Models whose rows are whole superblocks, and importance matrices for them: what mixes of types are made of."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_models import save_family

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9},
    "qwen2": {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "mixtral": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 8},
}
"""By family what is not as small as it is elsewhere; qwen2 has rows of 288, and no output.weight."""


def save_wide(folder: Path, name: str, **changes: Any) -> None:
    """One of `MODELS`, as transformers saves it."""
    save_family(folder, name, **{**MODELS[name], **changes})


def write_importance(path: Path, model: Path) -> None:
    """An importance matrix of a GGUF model, as `.gguf` or `.dat`, which knows nothing of attn_k."""
    random, found = np.random.default_rng(5), dict[str, tuple[np.ndarray, np.ndarray]]()
    for tensor in gguf.GGUFReader(model).tensors:
        columns, *rest = map(int, tensor.shape)
        if len(rest) == 0 or "attn_k" in tensor.name or "token_embd" in tensor.name:
            continue
        experts = rest[1] if len(rest) == 2 else 1
        counts = random.integers(1, 9, (experts, 1)).astype(np.float32)
        counts[-1] *= experts == 1
        found[tensor.name] = random.random((experts, columns), np.float32) * 10, counts
    if path.suffix == ".dat":
        data = struct.pack("<i", len(found))
        for name, (sums, _) in found.items():
            data += struct.pack(f"<i{len(name)}sii", len(name), name.encode(), 7, sums.size) + sums.tobytes()
        path.write_bytes(data + struct.pack("<ii8s", 7, 8, b"some.txt"))
        return
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in found.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
