"""GGUF files as plain checkpoints: every type, by the command, under the names that are there."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from support import to_bytes

import weightops
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.formats.gguf import gguf_layout
from weightops.formats.layout import Data, Literal
from weightops.formats.quantized.gguf import is_gguf, native_dtype, plain_gguf
from weightops.spec import DType, TensorSpec

GOLDEN = {
    DType(name): (base64.b64decode(entry["blocks"]), entry["sha256"])
    for name, entry in json.loads((Path(__file__).parents[2] / "golden" / "ggml" / "blocks.json").read_text()).items()
}
KINDS = {"adapter": "LoRA adapter", "imatrix": "importance matrix"}


def write(path: Path, metadata: dict[str, Any]) -> Path:
    """A file with a tensor of each block type, and one of integers."""
    specs = {f"types.{dtype.value}.weight": TensorSpec(dtype, (5, 512)) for dtype in GOLDEN}
    data = {name: GOLDEN[spec.dtype][0] for name, spec in specs.items()} | {"numbers": bytes(range(8))}
    specs["numbers"] = TensorSpec(DType.I8, (8,))
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        specs[name] = TensorSpec(DType.F16, (8, 2))
        data[name] = np.arange(16, dtype=np.float16).tobytes()
    pieces = gguf_layout(list(specs.items()), {"general.architecture": {"string": "llama"}, **metadata}).pieces
    assert all(isinstance(piece, Data | Literal) for piece in pieces)
    path.parent.mkdir()
    path.write_bytes(b"".join(data[p.name] if isinstance(p, Data) else p.data for p in pieces))  # type: ignore[union-attr]
    return path


@pytest.mark.parametrize(("asked", "dtype"), [("float32", DType.F32), (None, DType.BF16)])
def test_every_type_becomes_the_numbers_that_it_stands_for(tmp_path: Path, asked: str | None, dtype: DType) -> None:
    weightops.dequantize(write(tmp_path / "in" / "m.gguf", {}), tmp_path / "plain", dtype=asked)
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        found = {name: hashlib.sha256(to_bytes(file.get_tensor(name))).hexdigest() for name in sorted(file.keys())}
        assert file.metadata() == {"format": "pt"}
    assert found.pop("numbers") == hashlib.sha256(bytes(range(8))).hexdigest()
    found = {name: digest for name, digest in found.items() if name.startswith("types.")}
    assert found == {f"types.{kind.value}.weight": digests[dtype.value] for kind, (_, digests) in GOLDEN.items()}


@pytest.mark.parametrize(("file_type", "dtype"), [(0, DType.F32), (1, DType.F16), (15, DType.BF16), (32, DType.BF16)])
def test_the_native_dtype_follows_the_file_type(tmp_path: Path, file_type: int, dtype: DType) -> None:
    found = open_checkpoint(write(tmp_path / "in" / "m.gguf", {"general.file_type": {"uint32": file_type}}))
    assert is_gguf(found)
    assert native_dtype(found) is dtype
    plain = plain_gguf(found)
    assert {tensor.spec.dtype for tensor in plain.values()} == {dtype, DType.I8}
    assert plain.metadata == found.metadata


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_model_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "in" / "m.gguf", {"general.type": {"string": kind}})
    with pytest.raises(IncompatibleInputs, match=rf"m\.gguf:? is an? .*{KINDS[kind]}"):
        weightops.dequantize(path, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    assert weightops.inspect(path).kind == f"GGUF file, {kind}"


def test_a_dtype_that_is_none_for_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not dequantised to int8"):
        weightops.dequantize(write(tmp_path / "in" / "m.gguf", {}), tmp_path / "plain", dtype="int8")


def test_inspect_tells_types_and_parameters(tmp_path: Path) -> None:
    found = weightops.inspect(write(tmp_path / "in" / "m.gguf", {}), stats=True)
    assert (found.kind, found.model_type) == ("checkpoint", "llama")
    report = found.reports["types.q6_k.weight"]
    assert report.spec == TensorSpec(DType.Q6_K, (5, 512))
    assert report.statistics is not None
    assert report.statistics.elements == 2560


def test_compare_finds_no_difference_to_what_it_was_made_of(tmp_path: Path) -> None:
    """Rows of q and k included, whose order the GGUF file alone says."""
    path = write(tmp_path / "in" / "m.gguf", {"llama.attention.head_count": {"uint32": 2}})
    weightops.dequantize(path, tmp_path / "plain", dtype="float32")
    (report,) = weightops.compare(path, tmp_path / "plain", tolerance=0).comparisons
    assert report.differs is False
    assert len(report.tensors) == len(GOLDEN) + 3


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_containers_without_blocks_name_the_way_out(tmp_path: Path, container: Any) -> None:
    with pytest.raises(UsageError, match=r"types\..*\.weight: ") as caught:
        weightops.shard(write(tmp_path / "in" / "m.gguf", {}), tmp_path / "out", format=container)
    assert "weightops dequantize" in str(caught.value.hint)
