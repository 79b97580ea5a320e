"""Some of the experts: rows of routers, corrections and counts follow; what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from families import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM

import weightops
from weightops.errors import CorruptInput, SourceMissing, UsageError
from weightops.operations.experts import ExpertUse, LayerUse, parse_keep

KEPT = [0, 2, 3]


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    tiny(kind, **{**COMMON, **FAMILIES[kind], **changes}).save_pretrained(folder)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.state_dict()


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "granitemoe", "llama4_text", "gpt_oss", "ernie4_5_moe"]
)
def test_what_is_kept_is_a_slice_of_all_that_counts_experts(kind: str, tmp_path: Path) -> None:
    source = saved(kind, tmp_path / "model")
    weightops.experts(source, tmp_path / "out", keep=KEPT)
    before, after = state(source), state(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = set()
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            axis = next(i for i, (a, b) in enumerate(zip(tensor.shape, after[name].shape, strict=True)) if a != b)
            assert torch.equal(after[name], tensor.index_select(axis, torch.tensor(KEPT)))
            changed.add(name.rpartition(".")[2])
        else:
            assert torch.equal(after[name], tensor)
    assert {"gate_up_proj", "down_proj"} <= changed or "weight" in changed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {
        config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") if k in config
    } == {3}


def test_lists_by_layer_from_a_file(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "model")
    (tmp_path / "keep.json").write_text(json.dumps({"1": [3, 1], "2": [0, 1], "3": [2, 3]}))
    weightops.experts(source, tmp_path / "out", keep=str(tmp_path / "keep.json"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for layer, chosen in ((1, [1, 3]), (2, [0, 1]), (3, [2, 3])):
        gate = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(after[gate], before[gate][chosen])
        for new, old in enumerate(chosen):
            name = f"model.layers.{layer}.mlp.experts.{{}}.down_proj.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])


def test_quantised_stacks_and_experts_are_kept_as_they_are(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = saved("qwen3_moe", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name.replace("weight", "weight_scale_inv")] = torch.tensor([[float(len(tensors))]])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.1.mlp.experts.3.up_proj"]
    (source / "config.json").write_text(json.dumps(config))
    weightops.experts(source, tmp_path / "out", keep="1,3")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("weight", "weight_scale_inv"):
        name = f"model.layers.2.mlp.experts.{{}}.up_proj.{part}"
        assert torch.equal(after[name.format(1)].float(), tensors[name.format(3)].float())
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["quantization_config"]["modules_to_not_convert"] == ["model.layers.1.mlp.experts.1.up_proj"]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("0", "a token takes 2 experts .num_experts_per_tok., and 1 would be left"),
        ("0,4", "there is no expert 4"),
        ("0,0,1", "expert 0 is named twice"),
        ({"1": [0, 1], "2": [0, 1, 2], "3": [0, 1]}, "would keep 2 experts and .*layers.2.* 3"),
        ({"1": [0, 1], "2": [0, 1]}, "no list of experts for layer 3"),
        ({"0": [0, 1], "1": [0, 1], "2": [0, 1], "3": [0, 1]}, "layer 0 has no experts"),
        ("3-1", "cannot read the experts"),
    ],
)
def test_what_cannot_be_kept(keep: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        weightops.experts(saved("qwen3_moe", tmp_path / "model"), tmp_path / "out", keep=keep)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match="no such file, and no list of experts"):
        weightops.experts(saved("qwen3_moe", tmp_path / "model"), tmp_path / "out", keep="keep.json")


class TestGroups:
    """DeepSeek's router takes the best groups of experts first."""

    GROUPED: ClassVar = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}

    def test_as_many_of_every_group(self, tmp_path: Path) -> None:
        source = saved("deepseek_v3", tmp_path / "model", **self.GROUPED)
        weightops.experts(source, tmp_path / "out", keep="1,3,4,7")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["n_group"] == 2
        state(tmp_path / "out")

    def test_more_of_one_group_is_refused(self, tmp_path: Path) -> None:
        source = saved("deepseek_v3", tmp_path / "model", **self.GROUPED)
        with pytest.raises(UsageError, match="2 groups of 4 experts, which would keep 3, 1"):
            weightops.experts(source, tmp_path / "out", keep="0-2,4")

    def test_unless_there_are_to_be_no_groups(self, tmp_path: Path) -> None:
        source = saved("deepseek_v3", tmp_path / "model", **self.GROUPED)
        result = weightops.experts(source, tmp_path / "out", keep="0-2,4", ungroup=True)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["n_group"], config["topk_group"]) == (1, 1)
        assert any("not by groups" in warning for warning in result.warnings)


def test_how_many_a_token_takes_is_a_setting(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "model")
    weightops.experts(source, tmp_path / "out", per_token=1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 1
    with pytest.raises(UsageError, match="cannot take 5 experts"):
        weightops.experts(source, tmp_path / "other", per_token=5)


def test_fewer_and_stacked_at_once(tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path / "model")
    weightops.experts(source, tmp_path / "out", keep="0-2", layout="stacked")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == 3
    state(tmp_path / "out")


class TestScores:
    """A file of scores, as `eval --experts` writes it: the best of every layer."""

    REAP: ClassVar = {"1": (3.0, 1.0, 2.0, 4.0), "2": (1.0, 1.0, 1.0, 1.0), "3": (0.0, 0.5, 0.0, 0.1)}
    FREQUENCY: ClassVar = {"1": (0.1, 0.9, 0.8, 0.2), "2": (0.5, 0.5, 0.5, 0.5), "3": (0.1, 0.2, 0.3, 1.4)}

    def file(self, folder: Path, groups: int = 1, **changes: Any) -> str:
        layers = {name: LayerUse(frequency=self.FREQUENCY[name], reap=self.REAP[name]) for name in self.REAP}
        use = ExpertUse(model="model", tokens=10, seq_len=5, groups=groups, layers=layers)
        (folder / "use.json").write_text(json.dumps({**msgspec.to_builtins(use), **changes}))
        return str(folder / "use.json")

    @pytest.mark.parametrize(
        ("options", "lists"),
        [
            ({}, {"1": [0, 3], "2": [0, 1], "3": [1, 3]}),
            ({"by": "reap"}, {"1": [0, 3], "2": [0, 1], "3": [1, 3]}),
            ({"by": "frequency"}, {"1": [1, 2], "2": [0, 1], "3": [2, 3]}),
        ],
    )
    def test_the_best_are_chosen_and_of_equals_the_first(
        self, options: Any, lists: dict[str, list[int]], tmp_path: Path
    ) -> None:
        assert parse_keep(self.file(tmp_path), count=2, **options) == {"of": 4, **lists}

    def test_as_many_of_every_group(self, tmp_path: Path) -> None:
        keep = self.file(tmp_path, groups=2)
        assert parse_keep(keep, count=2) == {"of": 4, "1": [0, 3], "2": [0, 2], "3": [1, 3]}
        assert parse_keep(keep, count=2, by="frequency") == {"of": 4, "1": [1, 2], "2": [0, 2], "3": [1, 3]}
        assert parse_keep(keep, count=2, ungroup=True, by="frequency") == parse_keep(
            self.file(tmp_path), count=2, by="frequency"
        )
        with pytest.raises(UsageError, match="2 groups of experts, and 3 of 4 cannot be kept"):
            parse_keep(self.file(tmp_path, groups=2), count=3)

    def test_they_leave_a_model_that_loads(self, tmp_path: Path) -> None:
        source, keep = saved("qwen3_moe", tmp_path / "model"), self.file(tmp_path)
        weightops.experts(source, tmp_path / "out", keep=keep, count=2, by="frequency")
        before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
        for layer, chosen in ((1, [1, 2]), (2, [0, 1]), (3, [2, 3])):
            gate = f"model.layers.{layer}.mlp.gate.weight"
            assert torch.equal(after[gate], before[gate][chosen])
        state(tmp_path / "out")

    def test_a_step_of_a_recipe_takes_them(self, tmp_path: Path) -> None:
        source, keep = saved("qwen3_moe", tmp_path / "model"), self.file(tmp_path)
        step = {"experts": {"source": "moe", "keep": keep, "count": 2}}
        recipe = {"sources": {"moe": str(source)}, "tensors": {"few": step}}
        weightops.run({**recipe, "outputs": {str(tmp_path / "out"): {"from": "few"}}})
        assert len(load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.gate.weight"]) == 2

    @pytest.mark.parametrize(
        ("count", "changes", "message"),
        [
            (None, {}, "says how experts are used, not which to keep"),
            (5, {}, "of 4 experts 5 cannot be kept"),
            (2, {"groups": 3}, "3 groups of experts, and 2 of 4"),
            (2, {"layers": {}}, "has no layers of as many experts each"),
            (2, {"layers": {"1": {"frequency": [1.0], "reap": [1.0, 2.0]}}}, "says different things of layer 1"),
            (2, {"layers": {"1": {"frequency": [None, 1.0], "reap": [1.0, 2.0]}}}, "expected a list of numbers"),
            (2, {"schema": "weightops-eval/1"}, "expected a list of numbers"),
        ],
    )
    def test_what_such_a_file_cannot_be(self, count: int | None, changes: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=message):
            parse_keep(self.file(tmp_path, **changes), count=count)

    def test_a_model_with_other_experts_is_refused(self, tmp_path: Path) -> None:
        source = saved("qwen3_moe", tmp_path / "model", num_experts=6)
        with pytest.raises(UsageError, match="has 6 experts in each layer, and what to keep is chosen from 4"):
            weightops.experts(source, tmp_path / "out", keep=self.file(tmp_path), count=2)

    def test_a_count_without_scores_is_refused(self, tmp_path: Path) -> None:
        source = saved("qwen3_moe", tmp_path / "model")
        for keep in ("0-2", [0, 1, 2], None):
            with pytest.raises(UsageError, match="--count and --by choose by a file of scores"):
                weightops.experts(source, tmp_path / "out", keep=keep, count=2)
        with pytest.raises(UsageError, match="expected a list of experts for layer 1, found a number"):
            weightops.experts(source, tmp_path / "out", keep={"1": 2, "2": [0, 1], "3": [0, 1]})


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


class TestRefusedForWhatItIs:
    @pytest.mark.parametrize("count", ["4", [4, 4], True, 4.0])
    def test_a_count_that_is_no_number(self, count: Any, tmp_path: Path) -> None:
        source = saved("mixtral", tmp_path / "model")
        changed(source, num_local_experts=count)
        with pytest.raises(UsageError, match=r"config\.json: num_local_experts is .*, expected one number"):
            weightops.experts(source, tmp_path / "out", keep=KEPT)
        assert not (tmp_path / "out").exists()

    def test_experts_without_a_router(self, tmp_path: Path) -> None:
        source = saved("mixtral", tmp_path / "model")
        tensors = load_file(source / "model.safetensors")
        del tensors["model.layers.1.block_sparse_moe.gate.weight"]
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(CorruptInput, match=r"model\.layers\.1\.block_sparse_moe has experts, and no router"):
            weightops.experts(source, tmp_path / "out", keep=KEPT)
        assert not (tmp_path / "out").exists()

    def test_groups_that_do_not_divide_the_experts(self, tmp_path: Path) -> None:
        source = saved("deepseek_v3", tmp_path / "model")
        changed(source, n_group=8)
        with pytest.raises(UsageError, match="n_group is 8, which does not divide 4 experts"):
            weightops.experts(source, tmp_path / "out", keep=KEPT)

    @pytest.mark.parametrize("keep", ["0-99999999999999999999999", "9" * 5000, "0-70000"])
    def test_numbers_beyond_all_experts(self, keep: str, tmp_path: Path) -> None:
        source = saved("mixtral", tmp_path / "model")
        with pytest.raises(UsageError, match="cannot read the experts"):
            weightops.experts(source, tmp_path / "out", keep=keep)

    def test_a_file_nested_without_end(self, tmp_path: Path) -> None:
        source = saved("mixtral", tmp_path / "model")
        (tmp_path / "keep.json").write_text("[" * 5000)
        with pytest.raises(UsageError, match="expected a list of numbers"):
            weightops.experts(source, tmp_path / "out", keep=str(tmp_path / "keep.json"))


def test_one_number_of_two_towers(tmp_path: Path) -> None:
    source = saved("qwen3_next", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    further = {n.replace("model.", "mtp."): t + 1 for n, t in tensors.items() if n.startswith("model.layers.0.mlp.")}
    save_file({**tensors, **further}, source / "model.safetensors", {"format": "pt"})
    lists = {str(layer): [0, 2] for layer in range(4)}
    with pytest.raises(UsageError, match=r"0 is the number of model\.layers\.0 and of mtp\.layers\.0"):
        weightops.experts(source, tmp_path / "out", keep=lists)
    assert not (tmp_path / "out").exists()
    weightops.experts(source, tmp_path / "out", keep={**lists, "mtp.layers.0": [1, 3]})
    after = load_file(tmp_path / "out" / "model.safetensors")
    for layer, numbers in (("model.layers.0", [0, 2]), ("mtp.layers.0", [1, 3])):
        router = f"{layer}.mlp.gate.weight"
        assert torch.equal(after[router], {**tensors, **further}[router][numbers])


def test_a_list_of_modules_names_the_experts_that_are_left(tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path / "model")
    block = "model.layers.0.block_sparse_moe"
    plain = [f"{block}.experts.1.w1", f"{block}.experts.2.w1", f"{block}.gate"]
    changed(source, quantization_config={"quant_method": "fp8", "modules_to_not_convert": plain})
    weightops.experts(source, tmp_path / "out", keep=KEPT)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = [f"{block}.experts.1.w1", f"{block}.gate"]
    assert config["quantization_config"]["modules_to_not_convert"] == expected


def test_a_range_of_python(tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path / "model")
    with pytest.raises(UsageError, match="keep is a range, which it cannot be"):
        weightops.experts(source, tmp_path / "out", keep=range(2))
