"""LoRA adapters that have no place in GGUF, and files that make none: each is refused by name, and nothing written."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import edit_config, edit_tensors
from gguf_adapters import PREFIX, made, shapes_of

import weightops
from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError, WeightopsError
from weightops.formats.folder import open_checkpoint
from weightops.layouts import gguf
from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType

Change = Callable[[dict[str, Any], dict[str, LazyTensor]], object]
Q, EMBED = "blk.0.attn_q.weight", "model.embed_tokens"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """An adapter for the LLaMA, to be edited."""
    return Path(shutil.copytree(made() / "llama-lora", tmp_path / "lora"))


def adding(name: str, *shape: int) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda state: {**state, f"{PREFIX}{name}": torch.ones(shape)})


def factors(module: str, out: int, inner: int, rank: int = 4) -> Callable[[Path], object]:
    more = {
        f"{PREFIX}{module}.lora_A.weight": torch.ones(rank, inner),
        f"{PREFIX}{module}.lora_B.weight": torch.ones(out, rank),
    }
    return lambda folder: edit_tensors(folder, lambda state: {**state, **more})


def setting(**values: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **values)


def dora(folder: Path) -> None:
    edit_config(folder, use_dora=True)

    def magnitudes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name.replace("lora_B.weight", "lora_magnitude_vector"): t[:, 0] for name, t in state.items()}
        return {**state, **{name: t for name, t in found.items() if "magnitude" in name}}

    edit_tensors(folder, magnitudes)


def biases(folder: Path) -> None:
    edit_config(folder, lora_bias=True)

    def with_biases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {n.replace("lora_B.weight", "lora_B.bias"): t[:, 0] for n, t in state.items() if "lora_B" in n}
        return {**state, **found}

    edit_tensors(folder, with_biases)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dora, UsageError, r"down_proj has a magnitude \(DoRA\), for which adapters in GGUF have no place"),
        (biases, UsageError, r"down_proj has a bias beside lora_B"),
        (setting(lora_alpha=0), CorruptInput, r"lora_alpha of model\.layers\.0\.\S+ is 0"),
        (setting(lora_alpha=1e40), CorruptInput, r"lora_alpha of \S+ is 1e\+40"),
        (setting(r=8), CorruptInput, r"has factors of rank 4, adapter_config\.json says 8"),
        (setting(alpha_pattern={"q_proj": 6e9}), UsageError, r"q_proj has 1e\+09 times the scale of other modules"),
        (setting(alora_invocation_tokens=[1, 2]), IncompatibleInputs, "alora_invocation_tokens"),
        (adding("model.layers.0.self_attn.q_proj.base_layer.bias", 64), UsageError, "a bias beside factors"),
        (adding("lm_head.weight", 300, 64), UsageError, r"lm_head\.weight has no factors, and is kept whole"),
        (
            adding("model.norm.weight", 32),
            IncompatibleInputs,
            r"norm\.weight is for a tensor of \[32\], in llama it is",
        ),
        (factors("model.layers.0.mlp.down_proj", 64, 60), IncompatibleInputs, r"\[64, 60\], in llama it is \[64, 96\]"),
        (
            factors("model.layers.0.mlp.experts.base_layer", 64, 64),
            UsageError,
            "experts that are stacked in one parameter",
        ),
        (factors("model.layers.0.mlp.gate_pool", 64, 96), UsageError, "gate_pool.weight is no tensor of a llama model"),
        (factors("model.layers.7.mlp.down_proj", 64, 96), UsageError, "layers.7.* is no tensor of a llama model"),
        (
            lambda folder: (folder / "value_head.bin").write_bytes(b"x"),
            UsageError,
            r"value_head\.bin beside the adapter",
        ),
    ],
)
def test_what_gguf_has_no_place_for_is_refused(
    tmp_path: Path, lora: Path, change: Callable[[Path], object], error: type[Exception], match: str
) -> None:
    change(lora)
    with pytest.raises(error, match=match):
        api.convert(lora, tmp_path / "out.gguf", to="gguf", base=made() / "llama")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("name", "module", "shape", "match"),
    [
        ("gemma", EMBED, (300, 64), "one tensor for both of its embeddings"),
        (
            "deepseek3",
            "model.layers.0.self_attn.kv_b_proj",
            (256, 32),
            "factors of a tensor that llama.cpp takes apart",
        ),
    ],
)
def test_what_llamacpp_cannot_change_is_refused(
    tmp_path: Path, name: str, module: str, shape: tuple[int, int], match: str
) -> None:
    folder = Path(shutil.copytree(made() / f"{name}-lora", tmp_path / "lora"))
    if module == EMBED:
        pair = {f"{PREFIX}{EMBED}.lora_embedding_A": torch.ones(4, 300)}
        pair[f"{PREFIX}{EMBED}.lora_embedding_B"] = torch.ones(64, 4)
        edit_tensors(folder, lambda state: {**state, **pair})
    else:
        assert shapes_of(made() / name)[f"{module}.weight"] == list(shape)
        factors(module, *shape)(folder)
    with pytest.raises(UsageError, match=match):
        api.convert(folder, tmp_path / "out.gguf", to="gguf")


def test_experts_are_all_there_and_of_one_rank(tmp_path: Path) -> None:
    expert = "model.layers.1.block_sparse_moe.experts.3.w2"
    folder = Path(shutil.copytree(made() / "mixtral-lora", tmp_path / "lora"))
    edit_config(folder, rank_pattern={expert: 8})
    factors(expert, 64, 96, rank=8)(folder)
    with pytest.raises(UsageError, match=r"experts of blk\.1\.ffn_down_exps\.weight have factors of ranks 4, 8"):
        api.convert(folder, tmp_path / "out.gguf", to="gguf")
    edit_tensors(folder, lambda state: {name: t for name, t in state.items() if expert not in name})
    with pytest.raises(CorruptInput, match="layer 1 has 3 experts with a w2, expected 4"):
        api.convert(folder, tmp_path / "out.gguf", to="gguf")


@functools.cache
def opened(name: str) -> Checkpoint:
    api.convert(made() / f"{name}-lora", made() / f"{name}-lora.gguf", to="gguf")
    return open_checkpoint(made() / f"{name}-lora.gguf")


def given(**values: Any) -> Change:
    return lambda metadata, _: metadata.update({key.replace("__", "."): value for key, value in values.items()})


def without(name: str) -> Change:
    return lambda metadata, tensors: metadata.pop(name, None) or tensors.pop(name)


def extra(name: str, *shape: int, dtype: DType = DType.F32) -> Change:
    return lambda _, tensors: tensors.update({name: LazyTensor.make(Given(dtype, shape, b""))})


def three_dimensions(metadata: dict[str, Any], tensors: dict[str, LazyTensor]) -> None:
    extra("blk.0.ffn_down.weight.lora_a", 1, 4, 96)(metadata, tensors)
    extra("blk.0.ffn_down.weight.lora_b", 1, 64, 4)(metadata, tensors)


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        (
            "llama",
            given(adapter__lora__alpha={"float32": float("nan")}),
            CorruptInput,
            "alpha is nan, expected a number",
        ),
        ("llama", given(adapter__lora__alpha={"string": "6"}), CorruptInput, "alpha is '6', expected a number"),
        ("llama", given(adapter__type={"string": "dora"}), UsageError, "an adapter of type dora, and no LoRA"),
        ("llama", without("adapter.type"), UsageError, "an adapter of type None"),
        (
            "llama",
            given(general__architecture={"string": "qwen2"}),
            IncompatibleInputs,
            "is for qwen2 models, base is a",
        ),
        (
            "llama",
            given(adapter__alora__invocation_tokens={"array": ["uint32", [1]]}),
            UsageError,
            "active after some tokens only",
        ),
        ("llama", without(f"{Q}.lora_b"), CorruptInput, r"attn_q\.weight has a lora_a and no lora_b"),
        ("llama", without(f"{Q}.lora_a"), CorruptInput, r"attn_q\.weight has a lora_b and no lora_a"),
        ("llama", extra(f"{Q}.lora_b", 64, 5), CorruptInput, "they are not of one rank"),
        ("llama", extra(f"{Q}.lora_b", 60, 4), WeightopsError, "q_proj"),
        ("llama", extra(f"{Q}.lora_a", 4, 60), IncompatibleInputs, r"q_proj\.weight is for a tensor of \[64, 60\]"),
        ("llama", extra(f"{Q}.lora_a", 4), CorruptInput, "they are no factors"),
        ("llama", extra(f"{Q}.lora_a", 0, 64), CorruptInput, "they are not of one rank"),
        ("llama", extra(f"{Q}.lora_a", 4, 64, dtype=DType.I32), CorruptInput, "expected floating-point numbers"),
        ("llama", extra(Q, 64, 64), CorruptInput, "attn_q.weight is no part of a LoRA adapter"),
        (
            "llama",
            extra("blk.0.attn_norm.weight", 32),
            IncompatibleInputs,
            r"input_layernorm\.weight is for a tensor of",
        ),
        ("llama", three_dimensions, CorruptInput, r"ffn_down\.weight has lora_a float32 \[1, 4, 96\], expected a m"),
        ("mixtral", extra("blk.0.ffn_up_exps.weight.lora_a", 3, 4, 64), CorruptInput, "makes 3 tensors"),
        ("mixtral", extra("blk.0.ffn_up_exps.weight.lora_a", 4, 64), CorruptInput, "they are no factors"),
    ],
)
def test_files_that_make_no_adapter_are_refused(name: str, change: Change, error: type[Exception], match: str) -> None:
    checkpoint = opened(name)
    metadata, tensors = dict(checkpoint.metadata), dict(checkpoint)
    change(metadata, tensors)
    base = gguf.Base(json.loads((made() / name / "config.json").read_text()), "base")
    with pytest.raises(error, match=match):
        gguf.read_adapter(replace(checkpoint, metadata=metadata, tensors=tensors), base)


def test_a_pair_for_no_tensor_of_the_base_is_refused() -> None:
    checkpoint = opened("llama")
    tensors = {name.replace("blk.1", "blk.9"): tensor for name, tensor in checkpoint.items()}
    base = gguf.Base(json.loads((made() / "llama/config.json").read_text()), "base")
    with pytest.raises(IncompatibleInputs, match=r"blk\.9\.\S+ is no tensor of base"):
        gguf.read_adapter(replace(checkpoint, tensors=tensors), base)


def test_a_file_without_an_alpha_has_scales_of_one() -> None:
    checkpoint = opened("llama")
    metadata = {name: value for name, value in checkpoint.metadata.items() if name != "adapter.lora.alpha"}
    base = gguf.Base(json.loads((made() / "llama/config.json").read_text()), "base")
    found = gguf.read_adapter(replace(checkpoint, metadata=metadata), base)
    config = json.loads(found.sidecars["adapter_config.json"].data)  # type: ignore[union-attr]
    assert config["r"] == config["lora_alpha"] == 4


def test_bases_of_absurd_sizes_are_refused(tmp_path: Path) -> None:
    config = json.loads((made() / "llama/config.json").read_text())
    for changes, match in (({"num_hidden_layers": 1 << 40}, "no model has more"), ({"model_type": "gpt2"}, "gpt2")):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(WeightopsError, match=match):
            api.convert(made() / "llama-lora", tmp_path / "x.gguf", to="gguf", base=tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    opened("llama")
    data = (made() / "llama-lora.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-100])
    with pytest.raises(CorruptInput, match="truncated"):
        api.convert(tmp_path / "cut.gguf", tmp_path / "out", to="hf", base=made() / "llama")


def test_models_and_adapters_are_not_taken_for_each_other(tmp_path: Path) -> None:
    opened("llama")
    base, file = made() / "llama", made() / "llama-lora.gguf"
    api.convert(base, tmp_path / "model.gguf", to="gguf")
    with pytest.raises(UsageError, match="is a LoRA adapter in GGUF already"):
        api.convert(file, tmp_path / "x.gguf", to="gguf", base=base)
    with pytest.raises(UsageError, match="is a LoRA adapter as peft saves it already"):
        api.convert(made() / "llama-lora", tmp_path / "x", to="hf", base=base)
    with pytest.raises(UsageError, match="is no LoRA adapter, which a base could be for"):
        api.convert(base, tmp_path / "x.gguf", to="gguf", base=base)
    with pytest.raises(UsageError, match="imatrix has no use without a type"):
        api.convert(made() / "llama-lora", tmp_path / "x.gguf", to="gguf", imatrix=file)
    with pytest.raises(UsageError, match="adapters are not written in q4_k_m"):
        api.convert(made() / "llama-lora", tmp_path / "x.gguf", to="gguf", dtype="q4_k_m")
    with pytest.raises(UsageError, match="for which set has no use"):
        api.convert(made() / "llama-lora", tmp_path / "x.gguf", to="gguf", set={"pre": "llama-bpe"})
    with pytest.raises(IncompatibleInputs, match=r"the base llama-lora\.gguf is a LoRA adapter, not a model"):
        api.convert(made() / "llama-lora", tmp_path / "x.gguf", to="gguf", base=file)
    for act in (
        lambda: api.convert(file, tmp_path / "x", to="meta"),
        lambda: weightops.merge_lora(file, file, tmp_path / "x"),
        lambda: weightops.dequantize(file, tmp_path / "x"),
    ):
        with pytest.raises(IncompatibleInputs, match=r"llama-lora\.gguf is a LoRA adapter, not a model"):
            act()
    with pytest.raises(SourceMissing, match=r"model\.gguf: has no adapter_config\.json") as caught:
        weightops.merge_lora(base, tmp_path / "model.gguf", tmp_path / "x")
    assert caught.value.hint == "this is a model, not an adapter"
