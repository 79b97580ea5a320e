"""Which file of a folder is the adapter, held against peft's own choice; and what was trained beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.utils import load_peft_weights
from safetensors.torch import save_file

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.adapter.files import is_adapter
from weightops.formats.adapter.lora import read_adapter
from weightops.formats.folder import open_adapter, open_checkpoint

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB")
FACTORS = {A: torch.ones(4, 8), B: torch.ones(6, 4)}
MODEL = {"model.norm.weight": torch.ones(8), "lm_head.weight": torch.ones(9, 8)}
PROJECTOR = {"base_model.model.model.mm_projector.0.weight": torch.ones(3, 8)}


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)


def make(folder: Path, adapter: str = "adapter_model.safetensors") -> Path:
    write(folder, adapter, FACTORS)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return folder


def sharded(folder: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, (tensor, value) in zip(names, MODEL.items(), strict=True):
        write(folder, name, {tensor: value})
    index = {"metadata": {}, "weight_map": dict(zip(MODEL, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def one(name: str) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, MODEL)


MODELS: dict[str, Callable[[Path], None]] = {
    **{
        name: one(name)
        for name in (
            "model.safetensors",
            "pytorch_model.bin",
            "pytorch_model_fsdp.bin",
            "ft-model-00001-of-00001.safetensors",
            "hf_model_0001_0.pt",
            "consolidated.00.pth",
        )
    },
    "shards": sharded,
}


@pytest.mark.parametrize("adapter", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_and_a_model_in_one_folder_are_each_found(
    tmp_path: Path, adapter: str, model: str, has_config: bool
) -> None:
    folder = make(tmp_path / "both", adapter)
    MODELS[model](folder)
    if has_config:
        (folder / "config.json").write_text("{}")
    assert load_peft_weights(str(folder), device="cpu").keys() == FACTORS.keys()
    assert set(open_adapter(folder)) == set(open_adapter(folder / adapter)) == FACTORS.keys()
    assert set(open_checkpoint(folder)) == MODEL.keys()
    assert is_adapter(open_adapter(folder))
    assert not is_adapter(open_checkpoint(folder))
    with pytest.raises(IncompatibleInputs, match=f"is a model, the adapter beside it is {adapter}"):
        read_adapter(open_checkpoint(folder))


@pytest.mark.parametrize(
    "name",
    [
        *("optimizer.pt", "optimizer.bin", "optimizer_1.bin", "scheduler.pt", "training_args.bin", "rng_state_0.pth"),
        *("sampler.bin", "adapter_0.pt", "adapter_model-1.bin", "model.gguf"),
    ],
)
def test_what_training_leaves_beside_an_adapter_is_no_part_of_it(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "adapter", "adapter_model.bin")
    (folder / name).write_bytes(b"whatever")
    for opened in (open_adapter(folder), open_adapter(folder / "adapter_model.bin")):
        assert set(opened) == FACTORS.keys()


def test_of_two_adapters_it_is_the_one_that_peft_reads(tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter")
    write(folder, "adapter_model.bin", {A: torch.zeros(4, 8)})
    assert load_peft_weights(str(folder), device="cpu").keys() == set(open_adapter(folder)) == FACTORS.keys()
    assert set(open_adapter(folder / "adapter_model.bin")) == {A}


@pytest.mark.parametrize(
    "name",
    [
        *("non_lora_trainables.bin", "non_lora_state_dict.bin", "mm_projector.bin", "adapter_projector.pt"),
        *("value_head.safetensors", "value_head.bin", "new_embeddings.safetensors", "new_embeddings.bin"),
    ],
)
def test_trained_weights_beside_an_adapter_are_read_with_it(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "adapter")
    write(folder, name, PROJECTOR)
    for path in (folder, folder / "adapter_model.safetensors"):
        found = read_adapter(open_adapter(path))
        assert found.whole.keys() == {"model.mm_projector.0.weight"}
        assert found.files == {"model.mm_projector.0.weight": name}
    assert set(open_checkpoint(folder)) == FACTORS.keys()


def test_files_that_hold_something_else_are_refused_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter")
    write(folder, "value_head.safetensors", {"input_embeddings": torch.ones(2)})
    with pytest.raises(IncompatibleInputs, match=r"adapter/value_head.safetensors: input_embeddings is no part"):
        read_adapter(open_adapter(folder))
    (folder / "value_head.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptInput, match=r"value_head\.safetensors"):
        open_adapter(folder)


def test_a_file_that_holds_nothing_adds_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter")
    write(folder, "non_lora_trainables.bin", {})
    assert read_adapter(open_adapter(folder)).whole == {}


def test_of_adapters_with_names_of_their_own_only_the_one_that_is_named_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter", "step-100.safetensors")
    write(folder, "step-200.safetensors", {name: tensor * 2 for name, tensor in FACTORS.items()})
    found = open_adapter(folder / "step-200.safetensors")
    assert set(found.shards.values()) == {"step-200.safetensors"}
    assert "step-100.safetensors is an adapter of its own beside step-200.safetensors: not used" in found.warnings


def test_an_adapter_under_any_name_is_what_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter", "lora.safetensors")
    for path in (folder, folder / "lora.safetensors", folder / "adapter_config.json"):
        assert read_adapter(open_adapter(path)).factors.keys() == {("model.layers.0.self_attn.q_proj", 0)}
