"""What several tests need: checkpoints of every dtype, and ways to hold results against references."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from weightops.formats.torch import legacy as torch_legacy
from weightops.formats.torch.objects import TorchFile
from weightops.io.source_file import SourceFile
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType
from weightops.stores.reader import FileReader

TORCH_DTYPES = [
    d for d in DType if hasattr(torch, d.value) and not d.is_packed and d not in (DType.C32, DType.C128, DType.F8_E8M0)
]
"""Types that torch and safetensors share."""


def torch_dtype(dtype: DType) -> torch.dtype:
    found = getattr(torch, dtype.value)
    assert isinstance(found, torch.dtype)
    return found


def from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of given bits."""
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The contiguous little-endian bytes of a tensor."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def given_tensor(tensor: torch.Tensor, dtype: DType | None = None) -> LazyTensor:
    """A lazy tensor with these values."""
    return LazyTensor.make(
        Given(dtype or DType(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape), to_bytes(tensor))
    )


def evaluate(tensor: LazyTensor, block: int | None = None) -> bytes:
    """All bytes of a lazy tensor, read in blocks of `block` bytes, however they fall on its grain."""
    result = bytearray(tensor.nbytes)
    with Evaluator() as read:
        step = block or max(1, tensor.nbytes)
        for start in range(0, tensor.nbytes, step):
            read(tensor, start, memoryview(result)[start : start + step])
    return bytes(result)


def evaluate_all(tensors: Sequence[LazyTensor]) -> list[bytes]:
    """All bytes of each, for operations that look at values."""
    return [evaluate(tensor) for tensor in tensors]


def read_torch(path: Path) -> TorchFile:
    """The header of a torch file on disk."""
    with FileReader() as files:
        return torch_legacy.read_torch(SourceFile.at(path), files)


def random_tensor(dtype: DType, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bits: NaN payloads, infinities, subnormals and negative zeros included."""
    count = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    if dtype is DType.BOOL:
        data &= 1
    return from_bytes(data.tobytes(), torch_dtype(dtype), shape)


shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def state_dicts(draw: st.DrawFn, dtypes: list[DType] = TORCH_DTYPES, max_size: int = 8) -> dict[str, torch.Tensor]:
    """Contiguous tensors of random dtypes, shapes and bits under random names."""
    seed = draw(st.integers(0, 2**32))
    chosen = draw(st.lists(names, max_size=max_size, unique=True))
    return {name: random_tensor(draw(st.sampled_from(dtypes)), draw(shapes), seed + i) for i, name in enumerate(chosen)}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object] | None = None, shards: int = 1
) -> Path:
    """A folder as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: tensors[n] for n in names[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes, shapes and bits."""
    return left.keys() == right.keys() and all(
        (a.dtype, a.shape, to_bytes(a)) == (right[n].dtype, right[n].shape, to_bytes(right[n])) for n, a in left.items()
    )
