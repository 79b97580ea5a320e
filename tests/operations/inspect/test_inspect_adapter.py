"""What inspect says of adapters that peft has made, held against the dense products and against peft's own modules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import Made, edit_config, edit_tensors, load_model, quietly, save_adapter, state
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from support import write_checkpoint

import weightops
from weightops.errors import IncompatibleInputs, UsageError
from weightops.operations.inspect import AdapterReport, Target


def report(folder: Path, **options: Any) -> AdapterReport:
    found = weightops.inspect(folder, **options).adapter
    assert found is not None
    return found


def by_module(found: AdapterReport) -> dict[str, Target]:
    return {target.module: target for target in found.targets}


def copied(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    return out


CASES = [
    ("llama", {}),
    ("llama", {"use_dora": True}),
    ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["k_proj"], "lora_bias": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("kind", "lora"), CASES)
def test_ranks_scales_and_spectra_are_those_of_peft(made: Made, kind: str, lora: dict[str, Any]) -> None:
    folder = made.adapter(kind, **lora)
    found = by_module(report(folder, stats=True))
    with quietly():
        model = PeftModel.from_pretrained(load_model(made.base(kind)), folder)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        target = found[name]
        assert (target.rank, target.alpha) == (layer.r["default"], layer.lora_alpha["default"])
        assert target.scale == pytest.approx(layer.scaling["default"])
        with quietly(), torch.no_grad():
            dense = layer.get_delta_weight("default").double().numpy()
        if target.embedding or kind == "gpt2":
            dense = dense.T
        assert target.shape == dense.shape
        assert target.change is not None
        values = np.linalg.svd(dense, compute_uv=False)[: target.rank]
        assert target.change.singular_values == pytest.approx(values.tolist(), rel=1e-5)
        assert target.change.norm == pytest.approx(float(np.linalg.norm(dense)), rel=1e-5)
        held = np.cumsum(values**2) / np.sum(values**2)
        assert target.change.r99 == int(np.searchsorted(held, 0.99)) + 1
        assert target.change.stable_rank == pytest.approx(float(np.sum(values**2) / values[0] ** 2), rel=1e-5)


def test_experts_that_are_stacked_are_counted_together(made: Made) -> None:
    lora = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    folder = made.adapter("mixtral", **lora)
    found = by_module(report(folder, stats=True, base=made.base("mixtral")))
    tensors = state(folder)
    for parameter, nested in (("gate_up_proj", "base_layer."), ("down_proj", "")):
        target = found[f"model.layers.0.mlp.experts.{parameter}"]
        assert (target.experts, target.rank) == (4, 4)
        path = f"base_model.model.model.layers.0.mlp.experts.{nested}"
        a, b = (tensors[f"{path}lora_{part}.weight"].double() for part in "AB")
        spectra = [
            np.linalg.svd(1.5 * (b.reshape(len(b), 4, 4)[:, :, e] @ a.reshape(4, 4, -1)[e]).numpy(), compute_uv=False)
            for e in range(4)
        ]
        expected = sorted((float(value) for each in spectra for value in each[:4]), reverse=True)
        assert target.change is not None
        assert target.change.singular_values == pytest.approx(expected, rel=1e-5)
        assert target.in_base
        assert target.problem is None


def test_headers_alone_tell_targets_and_the_base(made: Made) -> None:
    folder = made.adapter(modules_to_save=["lm_head"])
    found = report(folder)
    assert found.base_model == str(made.base())
    assert found.target_modules == ("down_proj", "q_proj")
    assert found.modules_to_save == ("lm_head",)
    assert [whole.tensor for whole in found.whole] == ["lm_head.weight"]
    assert {target.change for target in found.targets} == {None}
    assert (found.base, found.fits) == (None, None)
    assert report(folder / "adapter_model.safetensors").targets == found.targets


def test_an_adapter_fits_the_base_that_it_was_trained_on(made: Made) -> None:
    found = report(made.adapter(modules_to_save=["lm_head"]), base=made.base())
    assert found.fits is True
    assert by_module(found)["model.layers.1.mlp.down_proj"].in_base == ("model.layers.1.mlp.down_proj.weight",)
    assert found.whole[0].in_base == ("lm_head.weight",)


def test_what_does_not_fit_is_named_part_by_part(made: Made, tmp_path: Path) -> None:
    folder = copied(made.adapter(modules_to_save=["lm_head"]), tmp_path / "a")
    prefix = "base_model.model.model.layers"

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = f"{prefix}.0.self_attn.q_proj.lora_A.weight"
        moved = {key.replace(f"{prefix}.1.mlp", f"{prefix}.7.mlp"): value for key, value in tensors.items()}
        return {**moved, name: moved[name][:, :-1], "base_model.model.lm_head.weight": torch.zeros(101, 3)}

    edit_tensors(folder, edit)
    inspected = weightops.inspect(folder, base=made.base())
    found = inspected.adapter
    assert found is not None
    assert found.fits is False
    modules = by_module(found)
    assert modules["model.layers.0.mlp.down_proj"].problem is None
    assert "do not fit float32 [72, 72]" in str(modules["model.layers.0.self_attn.q_proj"].problem)
    assert "the base has no such module" in str(modules["model.layers.7.mlp.down_proj"].problem)
    assert (
        found.whole[0].problem
        == "a: lm_head.weight is float32 [101, 3], the base's lm_head.weight is float32 [101, 72]"
    )
    assert set(found.problems) <= set(inspected.warnings)


def test_a_part_that_could_be_two_tensors_of_the_base_is_a_problem_of_its_own(made: Made, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {f"{n}.lm_head.weight": torch.zeros(101, 72) for n in "ab"})
    found = report(made.adapter(modules_to_save=["lm_head"]), base=base)
    assert "lm_head.weight may be a.lm_head.weight or b.lm_head.weight of the base" in str(found.whole[0].problem)
    assert len(found.problems) == len(found.targets) + 1


def test_problems_of_many_parts_are_not_a_screenful_of_warnings(made: Made) -> None:
    folder = made.adapter(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    found = weightops.inspect(folder, base=made.base("gpt2"))
    assert found.adapter is not None
    assert len(found.adapter.problems) == 8
    assert found.warnings[-1] == "and 3 more parts of the adapter alike"


def test_a_base_is_for_adapters(made: Made) -> None:
    with pytest.raises(UsageError, match="is no adapter, which a base could be for"):
        weightops.inspect(made.base(), base=made.base())
    with pytest.raises(IncompatibleInputs, match=r"the base .* is a LoRA adapter"):
        weightops.inspect(made.adapter(), base=made.adapter())


def test_globs_choose_targets(made: Made) -> None:
    found = report(made.adapter(), include="*.0.*q_proj*", stats=True)
    assert by_module(found).keys() == {"model.layers.0.self_attn.q_proj"}


def test_what_the_config_and_the_factors_disagree_on_is_said(made: Made, tmp_path: Path) -> None:
    folder = copied(made.adapter(), tmp_path / "a")
    edit_config(folder, r=5)
    found = report(folder)
    assert "lora_A is float32 [4, 200], adapter_config.json says r = 5" in found.problems[0]


def test_other_kinds_of_adapters_are_an_inventory_with_a_warning(made: Made, tmp_path: Path) -> None:
    folder = copied(made.adapter(), tmp_path / "a")
    edit_config(folder, peft_type="LOHA")
    found = weightops.inspect(folder)
    assert found.adapter is None
    assert any("peft_type LOHA, expected LORA" in warning for warning in found.warnings)
    with pytest.raises(IncompatibleInputs, match="peft_type LOHA"):
        weightops.inspect(folder, base=made.base())


def test_factors_that_are_no_numbers_are_said_and_the_others_measured(made: Made, tmp_path: Path) -> None:
    folder = copied(made.adapter(), tmp_path / "a")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name] * torch.nan})
    found = by_module(report(folder, stats=True))
    broken = found["model.layers.0.self_attn.q_proj"]
    assert broken.change is not None
    assert broken.change.norm is None
    assert broken.problem == "model.layers.0.self_attn.q_proj: the factors hold NaN or infinities"
    assert sum(target.problem is None for target in found.values()) == 3


def test_an_adapter_that_adds_nothing_has_no_rank(made: Made, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", made.base())
    edit_tensors(folder, lambda tensors: {n: t * ("lora_A" in n) for n, t in tensors.items()})
    change = report(folder, stats=True).targets[0].change
    assert change is not None
    assert (change.norm, change.r99, change.stable_rank) == (0.0, None, None)
