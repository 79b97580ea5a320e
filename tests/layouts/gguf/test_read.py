"""GGUF files that make no model: each is refused by name, before anything is written."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_models import save_family
from safetensors.torch import load_file

from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError, WeightopsError
from weightops.formats.folder import open_checkpoint
from weightops.layouts import gguf
from weightops.layouts.source import Source
from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType

Change = Callable[[dict[str, Any], dict[str, LazyTensor]], object]


@functools.cache
def opened(name: str) -> Checkpoint:
    """A family's GGUF file, which stays open for the tests of a process."""
    folder = Path(tempfile.mkdtemp())
    save_family(folder / "model", name)
    api.convert(folder / "model", folder / "model.gguf", to="gguf")
    return open_checkpoint(folder / "model.gguf")


def read(checkpoint: Checkpoint) -> gguf.Saved:
    return gguf.read(Source(checkpoint, lambda _: None, lambda tensor: bytes(tensor.read())))


def without(name: str) -> Change:
    return lambda metadata, tensors: metadata.pop(name, None) or tensors.pop(name)


def given(**values: Any) -> Change:
    return lambda metadata, tensors: metadata.update({key.replace("__", "."): value for key, value in values.items()})


def extra(name: str, *shape: int) -> Change:
    return lambda metadata, tensors: tensors.update({name: LazyTensor.make(Given(DType.F32, shape, b""))})


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("llama", given(general__architecture={"string": "rwkv7"}), UsageError, "architecture rwkv7 is not converted"),
        ("llama", given(general__type={"string": "adapter"}), UsageError, "general.type adapter"),
        ("llama", without("general.architecture"), UsageError, "architecture None"),
        ("llama", without("llama.block_count"), CorruptInput, "llama.block_count is missing"),
        ("llama", given(llama__block_count={"uint32": 0}), CorruptInput, "llama.block_count is missing, or no number"),
        ("llama", given(llama__block_count={"uint32": 1 << 31}), CorruptInput, "num_hidden_layers is 2147483648"),
        ("llama", given(llama__block_count={"string": "2"}), CorruptInput, "llama.block_count"),
        ("llama", given(llama__attention__head_count={"uint32": 3}), WeightopsError, "model.gguf"),
        ("llama", given(llama__feed_forward_length={"uint32": 97}), CorruptInput, "the keys of the file say"),
        ("llama", without("blk.1.attn_q.weight"), CorruptInput, r"blk\.1\.attn_q\.weight is missing"),
        ("llama", without("token_embd.weight"), CorruptInput, r"token_embd\.weight is missing"),
        ("llama", extra("blk.0.attn_sinks.weight", 4), UsageError, r"attn_sinks.* has no place"),
        ("llama 3", extra("rope_freqs.weight", 0), CorruptInput, "expected a factor for each frequency"),
        ("phi3 long", without("rope_factors_short.weight"), CorruptInput, "rope_factors_short.weight is missing"),
        ("llama 3", given(llama__rope__freq_base={"float32": 1e4}), UsageError, "other factors"),
        ("mixtral", given(llama__expert_count={"uint32": 5}), CorruptInput, "makes 4 tensors|the keys of the file say"),
        ("mixtral", extra("blk.0.ffn_up_exps.weight", 8, 8), CorruptInput, r"cannot be made of float32 \[8, 8\]"),
        ("deepseek3", without("deepseek2.rope.dimension_count"), CorruptInput, "does not say"),
        ("gpt-oss", without("blk.0.ffn_up_exps.weight"), CorruptInput, r"blk\.0\.ffn_up_exps\.weight is missing"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Change, error: type[Exception], match: str) -> None:
    checkpoint = opened(name)
    metadata, tensors = dict(checkpoint.metadata), dict(checkpoint)
    change(metadata, tensors)
    with pytest.raises(error, match=match):
        read(replace(checkpoint, metadata=metadata, tensors=tensors))


def test_how_tokens_are_chosen_and_other_ends_come_back() -> None:
    checkpoint = opened("qwen2")
    said: Mapping[str, Any] = {
        "general.sampling.temp": {"float32": 0.699999988079071},
        "general.sampling.top_k": {"int32": 20},
        "tokenizer.ggml.eot_token_id": {"uint32": 2048},
    }
    saved = read(replace(checkpoint, metadata={**checkpoint.metadata, **said}))
    document = saved.sidecars["generation_config.json"]
    found = json.loads(document.data)  # type: ignore[union-attr]
    assert (found["temperature"], found["top_k"], found["do_sample"]) == (0.7, 20, True)
    assert found["eos_token_id"] == [1, 2048]
    assert saved.config["eos_token_id"] == 1


def test_blocks_are_rounded_once_and_float32_is_exact(tmp_path: Path) -> None:
    for folder in ("model", "gguf"):
        (tmp_path / folder).mkdir()
    save_family(tmp_path / "model", "qwen3")
    api.convert(tmp_path / "model", tmp_path / "gguf/model.gguf", to="gguf", dtype="q4_0")
    for dtype in ("float32", None):
        api.convert(tmp_path / "gguf/model.gguf", tmp_path / str(dtype), to="hf", dtype=dtype)
    exact, native = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "None"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert (exact[name] * 2**13 == (exact[name] * 2**13).round()).all()
    assert (native[name] == exact[name].bfloat16()).all()
