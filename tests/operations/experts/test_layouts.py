"""Experts stacked and apart: what transformers holds after loading, and the way back, for families of every kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM
from vision_models import save_whole

import weightops
from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.layouts.experts import find_blocks, find_family
from weightops.lazy import LazyTensor
from weightops.operations.experts.arrange import arranged
from weightops.ops.transpose import transposed

APART = ("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "jamba", "ernie4_5_moe", "olmoe")


def saved(kind: str, folder: Path) -> Path:
    tiny(kind, **{**COMMON, **FAMILIES[kind]}).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", APART)
def test_stacked_is_what_transformers_holds_and_apart_what_it_was(kind: str, tmp_path: Path) -> None:
    source = saved(kind, tmp_path / "model")
    weightops.experts(source, tmp_path / "stacked", layout="stacked")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state = model.state_dict()
    # ernie's router has a part that the files of all versions keep elsewhere
    stacked = {n: t for n, t in tensors(tmp_path / "stacked").items() if ".moe_statics." not in n}
    assert any(name.endswith("experts.gate_up_proj") for name in stacked)
    assert stacked.keys() <= state.keys()
    assert all(torch.equal(stacked[name], state[name]) for name in stacked)
    weightops.experts(tmp_path / "stacked", tmp_path / "apart", layout="separate")
    assert same(tensors(tmp_path / "apart"), tensors(source))


@pytest.mark.parametrize("kind", ["granitemoe", "llama4_text", "gpt_oss"])
def test_what_is_published_stacked_is_not_taken_apart(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no program reads them apart"):
        weightops.experts(saved(kind, tmp_path / "model"), tmp_path / "out", layout="separate")
    assert not (tmp_path / "out").exists()


def stacked_in_memory(source: Checkpoint) -> Checkpoint:
    blocks = find_blocks(source)
    return source.with_tensors(arranged(source, blocks, find_family(source, blocks), "stacked"))


def taken_apart(source: Checkpoint) -> dict[str, LazyTensor]:
    blocks = find_blocks(source)
    return arranged(source, blocks, find_family(source, blocks), "separate")


def test_a_family_that_is_not_known_is_told_by_names_that_are_one_familys(tmp_path: Path) -> None:
    source = open_checkpoint(saved("qwen3_moe", tmp_path / "model"))
    made = stacked_in_memory(source.with_config(lambda config: {**config, "model_type": "mine"}))
    assert "model.layers.1.mlp.experts.gate_up_proj" in made


def test_names_that_two_families_share_tell_nothing(tmp_path: Path) -> None:
    source = open_checkpoint(saved("mixtral", tmp_path / "model"))
    with pytest.raises(UsageError, match="cannot tell how model_type mine stacks its experts"):
        stacked_in_memory(source.with_config(lambda config: {**config, "model_type": "mine"}))


class TestByShape:
    """Qwen3-VL's stacks are published as columns, and written as rows by transformers 5."""

    def of_vision(self, tmp_path: Path, width: int, *, turned: bool) -> tuple[Checkpoint, Checkpoint]:
        settings = {**COMMON, **FAMILIES["qwen3_moe"], "moe_intermediate_size": width}
        tiny("qwen3_moe", **settings).save_pretrained(tmp_path / "model")
        source = open_checkpoint(tmp_path / "model")
        stacked = stacked_in_memory(source)
        if turned:
            stacked = replace(
                stacked, tensors={n: transposed(t) if ".experts." in n else t for n, t in stacked.items()}
            )
        return source, stacked.with_config(lambda config: {**config, "model_type": "qwen3_vl_moe_text"})

    @pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
    def test_the_shape_tells(self, turned: bool, tmp_path: Path) -> None:
        source, stacked = self.of_vision(tmp_path, 48, turned=turned)
        found = taken_apart(stacked)
        assert found.keys() == source.keys()
        assert all(found[name].read() == source[name].read() for name in found)

    def test_a_shape_of_both_is_refused(self, tmp_path: Path) -> None:
        _, stacked = self.of_vision(tmp_path, 32, turned=False)
        with pytest.raises(IncompatibleInputs, match="as many rows as columns"):
            taken_apart(stacked)


class TestHostile:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return saved("qwen3_moe", tmp_path / "model")

    def edited(self, source: Path, edit: dict[str, torch.Tensor | None]) -> Path:
        found = {**tensors(source), **edit}
        save_file({n: t for n, t in found.items() if t is not None}, source / "model.safetensors", {"format": "pt"})
        return source

    def test_a_gap_in_the_numbers(self, source: Path, tmp_path: Path) -> None:
        gone = {n: None for n in tensors(source) if ".experts.1." in n}
        with pytest.raises(CorruptInput, match=r"layers\.1\.mlp has experts up to number 3, and no number 1"):
            weightops.experts(self.edited(source, gone), tmp_path / "out", layout="stacked")

    def test_an_expert_that_lacks_a_layer(self, source: Path, tmp_path: Path) -> None:
        gone = {"model.layers.2.mlp.experts.3.up_proj.weight": None}
        with pytest.raises(CorruptInput, match=r"experts 0 and 3 of model\.layers\.2\.mlp differ .*up_proj"):
            weightops.experts(self.edited(source, gone), tmp_path / "out", layout="stacked")

    def test_stacked_and_apart_in_one_layer(self, source: Path, tmp_path: Path) -> None:
        both = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 64, 64)}
        with pytest.raises(CorruptInput, match=r"model\.layers\.1\.mlp has experts apart .* and stacked"):
            weightops.experts(self.edited(source, both), tmp_path / "out", layout="stacked")

    def test_experts_of_other_shapes(self, source: Path, tmp_path: Path) -> None:
        odd = {"model.layers.1.mlp.experts.2.down_proj.weight": torch.zeros(64, 48)}
        with pytest.raises(IncompatibleInputs, match=r"model\.layers\.1\.mlp: cannot stack"):
            weightops.experts(self.edited(source, odd), tmp_path / "out", layout="stacked")

    def test_a_router_of_another_model(self, source: Path, tmp_path: Path) -> None:
        odd = {"model.layers.1.mlp.gate.weight": torch.zeros(7, 64)}
        with pytest.raises(CorruptInput, match=r"mlp\.gate\.weight is \[7, 64\]: no entry for each of 4 experts"):
            weightops.experts(self.edited(source, odd), tmp_path / "out", layout="stacked")

    def test_quantised_experts_are_not_stacked(self, source: Path, tmp_path: Path) -> None:
        scales = {
            name.replace(".weight", ".weight_scale_inv"): torch.ones(1, 1)
            for name in tensors(source)
            if ".experts." in name
        }
        with pytest.raises(UsageError, match=r"weight_scale_inv is part of a quantised weight") as raised:
            weightops.experts(self.edited(source, scales), tmp_path / "out", layout="stacked")
        assert "dequantize" in str(raised.value.hint)

    def test_a_dense_model(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="has no experts that are known by their names"):
            weightops.experts(saved("llama", tmp_path / "dense"), tmp_path / "out", layout="stacked")

    def test_nothing_to_do(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="nothing is to be done"):
            weightops.experts(source, tmp_path / "out")


@pytest.mark.parametrize("layout", ["stacked", "separate"])
def test_experts_apart_and_stacked_in_one_layer(layout: Any, tmp_path: Path) -> None:
    tiny("mixtral", **{**COMMON, **FAMILIES["mixtral"]}).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    stack = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 192, 64)}
    save_file({**load_file(path), **stack}, path, {"format": "pt"})
    with pytest.raises(
        CorruptInput, match=r"model\.layers\.0 has experts apart in block_sparse_moe and stacked in mlp"
    ):
        weightops.experts(tmp_path / "model", tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_experts_of_two_types_are_named(tmp_path: Path) -> None:
    tiny("mixtral", **{**COMMON, **FAMILIES["mixtral"]}).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    save_file({**tensors, name: tensors[name].half()}, path, {"format": "pt"})
    with pytest.raises(IncompatibleInputs, match=r"experts of model\.layers\.0\.block_sparse_moe: cannot join"):
        weightops.experts(tmp_path / "model", tmp_path / "out", layout="stacked")


def test_apart_where_transformers_reads_stacks_alone(tmp_path: Path) -> None:
    save_whole("qwen3_vl_moe", tmp_path / "model")
    with pytest.raises(IncompatibleInputs, match=r"would not load: .*mlp\.experts"):
        weightops.experts(tmp_path / "model", tmp_path / "out", layout="separate")
    assert not (tmp_path / "out").exists()
