"""LoRA adapters to GGUF and back: the same bytes there and back, which peft loads and which any command takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import edit_config, edit_tensors, evaluate, load_model, quietly, save_adapter
from gguf_adapters import PREFIX, made
from gguf_models import save_with_sight
from hub import Hub
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import weightops
from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.cli.main import run
from weightops.errors import SourceMissing, UsageError
from weightops.formats.folder import open_checkpoint

Q, EMBED = "blk.0.attn_q.weight", "model.embed_tokens"
MODULE = f"{PREFIX}model.layers.0.self_attn.q_proj"


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
    assert (tmp_path / "file.gguf").read_bytes() == (tmp_path / "folder.gguf").read_bytes()
