"""Adapters taken off again, which is not exact and is said; and models that training has saved with factors in them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapters import Made, edit_config, load_model, quietly, save_adapter, state
from peft import PeftModel
from safetensors.torch import save_file

import weightops
from weightops.errors import CorruptInput, SourceMissing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [0.05, 0.5, 20.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_comes_back_is_said_before(made: Made, tmp_path: Path, dtype: str, size: float) -> None:
    """`size`: that of the change, as a share of the weights."""
    base, adapter = made.base("llama", dtype), shutil.copytree(made.adapter(seed=1), tmp_path / "adapter")
    edit_config(adapter, lora_alpha=6 * size / 20)
    added = weightops.merge_lora(base, adapter, tmp_path / "added")
    assert not added.warnings
    result = weightops.merge_lora(tmp_path / "added", adapter, tmp_path / "back", weight=-1.0)
    (said,) = result.warnings
    matched = re.search(r"sizes of (\d+) numbers about ([\d.]+) % of them .*roundings \((\S+) of the weights", said)
    assert matched
    old, new, middle = state(base), state(tmp_path / "back"), state(tmp_path / "added")
    changed = [name for name in old if not torch.equal(old[name], middle[name])]
    same = sum(int((old[name] == new[name]).sum()) for name in changed)
    count = sum(old[name].numel() for name in changed)
    assert int(matched[1]) == count
    assert float(matched[2]) == pytest.approx(100 * same / count, abs=5 if dtype == "fp32" else 2)
    off = sum(float((old[n].double() - new[n].double()).square().sum()) for n in changed)
    whole = sum(float(old[n].double().square().sum()) for n in changed)
    assert float(matched[3]) == pytest.approx((off / whole) ** 0.5, rel=0.5 if dtype == "fp32" else 0.1)


def dump(made: Made, folder: Path, *, prefix: bool) -> tuple[Path, Path]:
    """What a run has saved of a model in peft, and the adapter as peft itself saves it."""
    adapter = save_adapter(folder / "adapter", made.base(), 1, modules_to_save=["lm_head"])
    with quietly():
        model = PeftModel.from_pretrained(load_model(made.base()), adapter)
        whole = {n: t.detach().clone() for n, t in model.state_dict().items()}
    if not prefix:
        whole = {n.removeprefix("base_model.model."): t for n, t in whole.items()}
    (folder / "dump").mkdir()
    save_file(whole, folder / "dump/model.safetensors", {"format": "pt"})
    shutil.copy(made.base() / "config.json", folder / "dump")
    return folder / "dump", adapter


@pytest.mark.parametrize("prefix", [True, False])
def test_a_dump_of_training_is_merged_where_it_lies(made: Made, tmp_path: Path, prefix: bool) -> None:
    folder, adapter = dump(made, tmp_path, prefix=prefix)
    assert any("q_proj.base_layer.weight" in name for name in state(folder))
    weightops.merge_lora(made.base(), adapter, tmp_path / "wanted")
    weightops.merge_lora(folder, adapter, tmp_path / "apart")
    shutil.copy(adapter / "adapter_config.json", folder)
    weightops.merge_lora(folder, folder, tmp_path / "alone")
    wanted = state(tmp_path / "wanted")
    for name in ("apart", "alone"):
        found = state(tmp_path / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
        assert not (tmp_path / name / "adapter_config.json").exists()
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == "llama"


def test_a_dump_of_peft_before_base_layers(made: Made, tmp_path: Path) -> None:
    folder, adapter = dump(made, tmp_path, prefix=True)
    old = {name.replace(".base_layer", ""): tensor for name, tensor in state(folder).items()}
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    weightops.merge_lora(folder, adapter, tmp_path / "found")
    weightops.merge_lora(made.base(), adapter, tmp_path / "wanted")
    found, wanted = state(tmp_path / "found"), state(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_a_dump_without_config_or_with_a_weight_twice(made: Made, tmp_path: Path) -> None:
    folder, adapter = dump(made, tmp_path, prefix=True)
    with pytest.raises(SourceMissing, match=r"has no adapter_config\.json"):
        weightops.merge_lora(folder, folder, tmp_path / "out")
    tensors = state(folder)
    name = next(name for name in tensors if name.endswith("q_proj.base_layer.weight"))
    tensors[name.replace(".base_layer", "")] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptInput, match="are one weight of the base"):
        weightops.merge_lora(folder, adapter, tmp_path / "out")
