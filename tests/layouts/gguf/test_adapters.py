"""LoRA adapters to GGUF and back: the same bytes there and back, and what has no place or does not fit, by name."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import edit_config, edit_tensors, evaluate, load_model, quietly, save_adapter
from gguf_adapters import PREFIX, save_lora, shapes_of
from gguf_models import save_family, save_with_sight
from hub import Hub
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import weightops
from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.cli.main import run
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError, WeightopsError
from weightops.formats.folder import open_checkpoint
from weightops.layouts import gguf
from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType

Change = Callable[[dict[str, Any], dict[str, LazyTensor]], object]
Q, EMBED = "blk.0.attn_q.weight", "model.embed_tokens"
MODULE = f"{PREFIX}model.layers.0.self_attn.q_proj"


@functools.cache
def made() -> Path:
    """Bases, each made once for the tests of a process, with an adapter for each."""
    folder = Path(tempfile.mkdtemp())
    for name in ("llama", "qwen2", "gemma", "mixtral", "deepseek3"):
        save_family(folder / name, name)
    more: dict[str, dict[str, Any]] = {"qwen2": {"embedding": True, "norms": True}, "gemma": {"norms": True}}
    for name in ("llama", "qwen2", "gemma", "mixtral", "deepseek3"):
        save_lora(folder / f"{name}-lora", folder / name, **more.get(name, {}))
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """An adapter for the LLaMA, to be edited."""
    return Path(shutil.copytree(made() / "llama-lora", tmp_path / "lora"))


def there_and_back(adapter: Path, base: Path, folder: Path, **options: Any) -> Path:
    api.convert(adapter, folder / "lora.gguf", to="gguf", base=base, **options)
    api.convert(folder / "lora.gguf", folder / "back", to="hf", base=base)
    return folder / "back"


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "mixtral", "deepseek3"])
def test_there_and_back_it_is_the_same_file(tmp_path: Path, name: str) -> None:
    adapter = made() / f"{name}-lora"
    back = there_and_back(adapter, made() / name, tmp_path)
    assert (back / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    before, after = settings(adapter), settings(back)
    for field in ("peft_type", "task_type", "r", "lora_alpha", "target_modules"):
        assert after[field] == before[field], field
    assert sorted(after["modules_to_save"] or ()) == sorted(before["modules_to_save"] or ())
    assert after["rank_pattern"] == {}


def test_of_a_model_that_sees_the_language_model_is_changed(tmp_path: Path) -> None:
    """peft makes the adapter of all of it, finds what comes back there, and nothing that sees is a target of it."""
    save_with_sight(tmp_path / "base")
    save_adapter(tmp_path / "all", tmp_path / "base", target_modules=["q_proj", "down_proj", "fc1"])
    result = api.convert(tmp_path / "all", tmp_path / "lora.gguf", to="gguf", base=tmp_path / "base")
    assert any("which llama.cpp has in a file of its own (mmproj)" in each for each in result.warnings)
    api.convert(tmp_path / "lora.gguf", tmp_path / "back", to="hf", base=tmp_path / "base")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("all", "back"))
    assert after.keys() == {name for name in before if "vision" not in name}
    assert all(torch.equal(after[name], before[name]) for name in after)
    with quietly():
        loaded = PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "back")
        found = {name.replace(".default", ""): tensor for name, tensor in loaded.named_parameters() if "lora_" in name}
    assert found.keys() == after.keys()
    assert all(torch.equal(found[name], after[name]) for name in after)


def test_rows_of_q_and_k_lie_in_pairs_as_those_of_the_model(tmp_path: Path) -> None:
    """The change in the file, at the scale that llama.cpp gives it, is that of rows as the base's file has them."""
    base, adapter = made() / "llama", made() / "llama-lora"
    api.convert(adapter, tmp_path / "lora.gguf", to="gguf")
    weightops.merge_lora(base, adapter, tmp_path / "merged")
    for name in ("base", "merged"):
        api.convert(base if name == "base" else tmp_path / name, tmp_path / f"{name}.gguf", to="gguf", dtype="float32")
    plain, merged, lora = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("base", "merged", "lora"))
    for name in (Q, "blk.1.attn_k.weight", "blk.0.ffn_down.weight"):
        a, b = values(lora, f"{name}.lora_a"), values(lora, f"{name}.lora_b")
        change = values(merged, name) - values(plain, name)
        np.testing.assert_allclose(b @ a * (6 / 4), change, atol=2e-2)  # which is bfloat16
        assert np.abs(change).max() > 0.5


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    tensor = checkpoint[name]
    return np.frombuffer(evaluate([tensor])[0], np.float32).reshape(tensor.spec.shape)


def test_peft_loads_what_comes_back_and_computes_the_same(tmp_path: Path) -> None:
    base = made() / "qwen2"
    back = there_and_back(made() / "qwen2-lora", base, tmp_path)
    tokens = torch.arange(3, 40)[None]
    logits = []
    with quietly(), torch.no_grad():
        for folder in (made() / "qwen2-lora", back):
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            logits.append(PeftModel.from_pretrained(model, folder)(input_ids=tokens).logits)
        alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=tokens).logits
    assert torch.equal(*logits)
    assert not torch.allclose(logits[0], alone, atol=0.1)


def test_an_adapter_in_gguf_is_merged_and_inspected_as_any_other(tmp_path: Path) -> None:
    base, adapter = made() / "llama", made() / "llama-lora"
    api.convert(adapter, tmp_path / "lora.gguf", to="gguf")
    weightops.merge_lora(base, adapter, tmp_path / "expected")
    weightops.merge_lora(base, tmp_path / "lora.gguf", tmp_path / "found")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "found"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    report = api.inspect(tmp_path / "lora.gguf", base=base).adapter
    assert report is not None
    assert report.fits
    assert len(report.targets) == 14


def test_other_ranks_and_scales_are_what_they_were(tmp_path: Path, lora: Path) -> None:
    """One alpha is all that a file has: of modules with another, B holds the rest."""

    def wider(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state[f"{MODULE}.lora_A.weight"] = torch.ones(8, 64)
        state[f"{MODULE}.lora_B.weight"] = torch.ones(64, 8)
        return state

    edit_tensors(lora, wider)
    edit_config(lora, rank_pattern={"layers.0.self_attn.q_proj": 8}, alpha_pattern={"layers.1.mlp.up_proj": 12})
    result = api.convert(lora, tmp_path / "lora.gguf", to="gguf")
    assert any("GGUF has one alpha, which is 6 here; the scales of 1 modules" in each for each in result.warnings)
    api.convert(tmp_path / "lora.gguf", tmp_path / "back", to="hf", base=made() / "llama")
    after, before, found = settings(tmp_path / "back"), load_file(lora / "adapter_model.safetensors"), None
    assert (after["r"], after["lora_alpha"]) == (4, 6)
    assert after["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 8}
    found = load_file(tmp_path / "back/adapter_model.safetensors")
    for name, tensor in before.items():
        factor = 2 if "1.mlp.up_proj.lora_B" in name else 1
        assert torch.equal(found[name], tensor * factor), name


def test_a_rank_stabilised_scale_is_an_alpha(tmp_path: Path, lora: Path) -> None:
    edit_config(lora, use_rslora=True)
    assert settings(there_and_back(lora, made() / "llama", tmp_path))["lora_alpha"] == 12  # 6 / sqrt(4) * 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_smaller_types_come_back_near(tmp_path: Path, dtype: str) -> None:
    adapter = made() / "llama-lora"
    found = load_file(there_and_back(adapter, made() / "llama", tmp_path, dtype=dtype) / "adapter_model.safetensors")
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(found[name].float(), tensor, atol=2e-2, rtol=1e-2)


def test_the_base_is_a_folder_a_config_or_a_gguf_file_of_it(tmp_path: Path, lora: Path) -> None:
    api.convert(made() / "llama", tmp_path / "base.gguf", to="gguf")
    edit_config(lora, base_model_name_or_path="someone/tiny")
    (tmp_path / "alone").mkdir()
    shutil.copy(made() / "llama/config.json", tmp_path / "alone")
    bases = [made() / "llama", tmp_path / "alone", tmp_path / "alone/config.json", tmp_path / "base.gguf"]
    files = []
    for base in bases:
        api.convert(lora, tmp_path / "lora.gguf", to="gguf", base=base, overwrite=True)
        files.append((tmp_path / "lora.gguf").read_bytes())
    assert len(set(files)) == 1
    with pytest.raises(UsageError, match=r"the base, someone/tiny, is not on this machine") as caught:
        api.convert(lora, tmp_path / "x.gguf", to="gguf")
    assert "--base hf://someone/tiny" in str(caught.value.hint)
    edit_config(lora, base_model_name_or_path=None)
    with pytest.raises(UsageError, match="nothing says what its base is"):
        api.convert(lora, tmp_path / "x.gguf", to="gguf")
    with pytest.raises(SourceMissing, match=r"has no config\.json, and is no GGUF file"):
        api.convert(lora, tmp_path / "x.gguf", to="gguf", base=made() / "llama/model.safetensors")


def test_adapter_and_base_may_be_on_a_hub(tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.convert(lora, tmp_path / "expected.gguf", to="gguf", base=made() / "llama")
    with Hub() as hub:
        hub.add("someone/tiny", {"config.json": (made() / "llama/config.json").read_bytes()})
        hub.add("someone/lora", {path.name: path.read_bytes() for path in lora.iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        options = ["--base", "hf://someone/tiny", "--out", str(tmp_path / "found.gguf")]
        assert run(["convert", "hf://someone/lora", "--to", "gguf", *options]) == 0
    expected, found = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("expected", "found"))
    assert evaluate(list(found.values())) == evaluate(list(expected.values()))
    assert found.metadata["general.type"] == {"string": "adapter"}


@pytest.mark.parametrize("named", ["a\0b", "x" * 5000, "/proc/self/mem", "someone/tiny\x1b[31m"])
def test_what_an_adapter_calls_its_base_may_be_anything(tmp_path: Path, lora: Path, named: str) -> None:
    edit_config(lora, base_model_name_or_path=named)
    with pytest.raises(UsageError, match="is not on this machine") as caught:
        api.convert(lora, tmp_path / "x.gguf", to="gguf")
    assert "\x1b" not in f"{caught.value} {caught.value.hint}"
    assert len(f"{caught.value}") < 400


def test_the_base_is_called_as_the_card_calls_it(tmp_path: Path, lora: Path) -> None:
    (lora / "README.md").write_text("---\nbase_model: someone/Tiny-7B\n---\n")
    assert settings(there_and_back(lora, made() / "llama", tmp_path))["base_model_name_or_path"] == "someone/Tiny-7B"


def test_a_weight_file_by_itself_is_an_adapter_too(tmp_path: Path, lora: Path) -> None:
    api.convert(lora, tmp_path / "folder.gguf", to="gguf")
    api.convert(lora / "adapter_model.safetensors", tmp_path / "file.gguf", to="gguf")
    assert set(open_checkpoint(tmp_path / "file.gguf")) == set(open_checkpoint(tmp_path / "folder.gguf"))


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
        (setting(alora_invocation_tokens=[1, 2]), IncompatibleInputs, "alora_invocation_tokens"),
        (adding("model.layers.0.self_attn.q_proj.base_layer.bias", 64), UsageError, "a bias beside factors"),
        (adding("lm_head.weight", 300, 64), UsageError, r"lm_head\.weight has no factors, and is kept whole"),
        (
            adding("model.norm.weight", 32),
            IncompatibleInputs,
            r"norm\.weight is for a tensor of \[32\], in llama it is",
        ),
        (factors("model.layers.0.mlp.down_proj", 64, 60), IncompatibleInputs, r"\[64, 60\], in llama it is \[64, 96\]"),
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
