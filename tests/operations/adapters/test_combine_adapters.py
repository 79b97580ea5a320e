"""Adapters combined: peft's methods to its bits, exact sums where it is wrong, and results that peft loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_sums import changes_in, changes_of, combined_by_peft, distance, factors_in, loaded, total
from adapters import DTYPES, Made, edit_config, edit_tensors, save_adapter, state

import weightops
from weightops.recipes.execute import Result

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = (0.75, -0.5)


@pytest.fixture(scope="module")
def two(made: Made) -> list[Path]:
    """Two adapters of one rank and other alphas, on different modules but for one."""
    return [
        made.adapter(seed=1, target_modules=["q_proj", "down_proj"]),
        made.adapter(seed=2, lora_alpha=10, target_modules=["q_proj", "up_proj"]),
    ]


def combine(adapters: list[Path], out: Path, method: str, weights: Any = WEIGHTS, **options: Any) -> Result:
    return weightops.combine_adapters(adapters, out, method=method, weight=weights, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.3, "vote": "frequency"}),
        ("magnitude_prune", {"density": 0.7}),
        ("magnitude_prune", {"density": 1.0}),
    ],
)
def test_methods_on_factors_have_the_bits_of_peft(
    made: Made, two: list[Path], tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    combine(two, tmp_path / "ours", method, **options)
    theirs = {**options, "majority_sign_method": options.get("vote", "total")}
    theirs.pop("vote", None)
    wanted = factors_in(combined_by_peft(made.base(), two, WEIGHTS, method, **theirs), "made")
    found = state(tmp_path / "ours")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (config,) = (json.loads((tmp_path / "ours/adapter_config.json").read_text()),)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {}),
        ("svd", {}),
        ("svd", {"rank": 6}),
        ("ties_svd", {"density": 0.5}),
        ("magnitude_prune_svd", {"density": 0.5, "rank": 7}),
    ],
)
def test_other_methods_change_what_peft_does(
    made: Made, two: list[Path], tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    combine(two, tmp_path / "ours", method, **options)
    theirs = {"svd_rank" if key == "rank" else key: value for key, value in options.items()}
    model = combined_by_peft(made.base(), two, WEIGHTS, method, **theirs)
    assert distance(changes_of(tmp_path / "ours"), changes_in(model, "made")) < 2e-5


def test_cat_is_the_sum_and_keeps_b(two: list[Path], tmp_path: Path) -> None:
    result = combine(two, tmp_path / "out", "cat")
    assert distance(changes_of(tmp_path / "out"), total(two, WEIGHTS)) < 1e-7
    (b,) = (t for n, t in state(tmp_path / "out").items() if n.endswith("layers.0.self_attn.q_proj.lora_B.weight"))
    ours = [state(folder)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] for folder in two]
    assert torch.equal(b, torch.cat(ours, dim=1))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], sorted(config["rank_pattern"].values())) == (4, [8, 8])
    assert result.manifest is not None
    assert not result.manifest.notes


def test_cat_of_short_numbers_is_exact(made: Made, tmp_path: Path) -> None:
    short = [made.adapter(seed=seed, lora_alpha=8, dtype=DTYPES["bf16"]) for seed in (1, 2)]
    combine(short, tmp_path / "out", "cat")
    wanted = total(short, WEIGHTS)
    assert all(torch.equal(change, wanted[name]) for name, change in changes_of(tmp_path / "out").items())


def test_svd_of_the_whole_rank_is_the_sum_and_of_a_lower_the_best(two: list[Path], tmp_path: Path) -> None:
    combine(two, tmp_path / "all", "svd", rank=8)
    exact = total(two, WEIGHTS)
    assert distance(changes_of(tmp_path / "all"), exact) < 1e-6
    result = combine(two, tmp_path / "three", "svd", rank=3)
    assert result.manifest is not None
    for name, change in changes_of(tmp_path / "three").items():
        values = torch.linalg.svdvals(exact[name])
        best = float(values[3:].norm() / values.norm())
        assert float((change - exact[name]).norm() / exact[name].norm()) == pytest.approx(best, rel=1e-5, abs=1e-7)
        assert result.manifest.notes[name]["error"] == pytest.approx(best, rel=1e-5, abs=1e-7)


def test_signs_of_singular_vectors_are_fixed(two: list[Path], tmp_path: Path) -> None:
    combine(two, tmp_path / "out", "svd")
    for name, tensor in state(tmp_path / "out").items():
        if "lora_A" in name:
            assert (tensor.gather(1, tensor.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", ["linear", "ties", "ties_svd"])
def test_what_a_method_is_off_is_measured(two: list[Path], tmp_path: Path, method: str) -> None:
    options = {} if method == "linear" else {"density": 0.5}
    result = combine(two, tmp_path / "out", method, **options)
    assert result.manifest is not None
    exact, made = total(two, WEIGHTS), changes_of(tmp_path / "out")
    assert result.manifest.notes.keys() == exact.keys()
    for name, note in result.manifest.notes.items():
        error = float((made[name] - exact[name]).norm() / exact[name].norm())
        assert note["error"] == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert note["norm"] == pytest.approx(float(exact[name].norm()), rel=1e-5)


def test_masks_depend_on_seed_and_place_alone(two: list[Path], tmp_path: Path) -> None:
    made = {}
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        combine(two, tmp_path / name, "dare_linear", density=0.5, seed=seed)
        made[name] = state(tmp_path / name)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(made["one"][name], made["two"][name])
    assert not torch.equal(made["one"][name], made["three"][name])
    parts = [torch.zeros(()), torch.zeros(())]
    for i, (folder, weight, alpha) in enumerate(zip(two, WEIGHTS, (6, 10), strict=True)):
        strength = weight * alpha / 4
        root = torch.tensor(math.copysign(math.sqrt(abs(strength)), strength))
        parts[i] = state(folder)[name] / 0.5 * root
    choices = torch.stack([torch.zeros_like(parts[0]), parts[0], parts[1], parts[0] + parts[1]])
    is_one = (made["one"][name] - choices).abs() < 1e-6
    assert is_one.any(dim=0).all()
    counts = is_one.float().argmax(dim=0).flatten().bincount(minlength=4)
    assert (counts > 0.15 * counts.sum()).all()


# --- what peft 0.21 gets wrong -------------------------------------------------------------------------------------


def test_rank_stabilised_sources(made: Made, tmp_path: Path) -> None:
    folders = [made.adapter(seed=seed, r=8, use_rslora=True) for seed in (1, 2)]
    exact = total(folders, WEIGHTS)
    theirs = changes_in(combined_by_peft(made.base(), folders, WEIGHTS, "cat"), "made")
    assert distance(theirs, exact) > 1  # it keeps the flag, and is the square root of the rank too strong
    for method in ("cat", "svd"):
        combine(folders, tmp_path / method, method, **({"rank": 16} if method == "svd" else {}))
        assert distance(changes_of(tmp_path / method), exact) < 1e-6
        assert not json.loads((tmp_path / method / "adapter_config.json").read_text())["use_rslora"]


def test_ranks_and_alphas_of_single_modules(made: Made, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    folders = [made.adapter(seed=1, **patterns), made.adapter(seed=2)]
    model = combined_by_peft(made.base(), folders, WEIGHTS, "cat")
    ranks = {t.shape[0] for n, t in factors_in(model, "made").items() if "lora_A" in n}
    made_config = model.peft_config["made"]
    assert (ranks, made_config.r, made_config.rank_pattern) == ({8}, 8, {})  # zeros where there is less
    combine(folders, tmp_path / "out", "cat")
    assert {t.shape[0] for n, t in state(tmp_path / "out").items() if "lora_A" in n} == {6, 8}
    assert (
        distance(changes_in(loaded(made.base(), [folders[0], tmp_path / "out"]), "a1"), total(folders, WEIGHTS)) < 1e-5
    )


def test_one_adapter_is_not_linear_then(made: Made, tmp_path: Path) -> None:
    folder = made.adapter(seed=1)
    theirs = factors_in(combined_by_peft(made.base(), [folder], [2.0], "magnitude_prune", density=0.5), "made")
    assert not any((tensor == 0).any() for tensor in theirs.values())  # nothing is pruned
    combine([folder], tmp_path / "out", "magnitude_prune", (2.0,), density=0.5)
    assert all(int((tensor == 0).sum()) == tensor.numel() // 2 for tensor in state(tmp_path / "out").values())
    combine([folder], tmp_path / "cat", "cat", (2.0,))
    assert distance(changes_of(tmp_path / "cat"), total([folder], [2.0])) < 1e-7


def test_stacked_experts(made: Made, tmp_path: Path) -> None:
    target = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    folders = [made.adapter("mixtral", seed=seed, lora_alpha=4, **target) for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        combined_by_peft(made.base("mixtral"), folders, WEIGHTS, "cat")
    for method in ("cat", "svd"):
        combine(folders, tmp_path / f"{method}-adapter", method, **({"rank": 8} if method == "svd" else {}))
        for folder, weight in zip(folders, WEIGHTS, strict=True):
            weightops.merge_lora(made.base("mixtral"), folder, tmp_path / method / folder.name, weight=weight)
        weightops.merge_lora(made.base("mixtral"), tmp_path / f"{method}-adapter", tmp_path / method / "both")
        base = state(made.base("mixtral"))
        both = state(tmp_path / method / "both")
        apart = [state(tmp_path / method / folder.name) for folder in folders]
        for name, tensor in base.items():
            wanted = sum((each[name] - tensor for each in apart), tensor)
            torch.testing.assert_close(both[name], wanted, rtol=1e-4, atol=1e-5)
    loaded(made.base("mixtral"), [folders[0], tmp_path / "cat-adapter"])


def test_modules_saved_whole(made: Made, tmp_path: Path) -> None:
    saved = made.adapter(seed=1, modules_to_save=["lm_head"])
    plain = made.adapter(seed=2)
    same = save_adapter(tmp_path / "same", made.base(), 3, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="target the same module with modules_to_save"):
        combined_by_peft(made.base(), [saved, same], WEIGHTS, "cat")
    head = "base_model.model.lm_head.weight"
    edit_tensors(same, lambda tensors: {**tensors, head: state(saved)[head]})
    for name, other in (("one", plain), ("both", same)):
        result = combine([saved, other], tmp_path / name, "cat", (1.0, -0.5))
        assert torch.equal(state(tmp_path / name)[head], state(saved)[head])
        loaded(made.base(), [plain, tmp_path / name])
        assert not result.warnings
    result = combine([saved, plain], tmp_path / "weighed", "cat", (0.5, 1.0))
    assert "lm_head.weight whole, which has no scale" in result.warnings[0]


# --- kinds of adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj", "embed_tokens"]), ("gpt2", ["c_attn", "wte"])])
def test_embeddings_and_modules_of_gpt2(made: Made, tmp_path: Path, kind: str, targets: list[str]) -> None:
    folders = [made.adapter(kind, seed=seed, target_modules=targets) for seed in (1, 2)]
    combine(folders, tmp_path / "cat", "cat")
    assert (
        distance(changes_in(loaded(made.base(kind), [folders[0], tmp_path / "cat"]), "a1"), total(folders, WEIGHTS))
        < 1e-5
    )
    combine(folders, tmp_path / "ties", "ties", density=0.5)
    theirs = combined_by_peft(made.base(kind), folders, WEIGHTS, "ties", density=0.5)
    assert distance(changes_of(tmp_path / "ties"), changes_in(theirs, "made")) < 1e-5
    loaded(made.base(kind), [folders[0], tmp_path / "ties"])


def test_biases_of_factors_are_added_up(made: Made, tmp_path: Path) -> None:
    folders = [made.adapter("biased", seed=seed, lora_bias=True, target_modules=["q_proj"]) for seed in (1, 2)]
    combine(folders, tmp_path / "out", "svd")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    wanted = sum(w * 6 / 4 * state(f)[name] for f, w in zip(folders, WEIGHTS, strict=True))
    torch.testing.assert_close(state(tmp_path / "out")[name], wanted)
    loaded(made.base("biased"), [folders[0], tmp_path / "out"])


def test_an_adapter_with_itself_and_one_of_zeros(made: Made, tmp_path: Path) -> None:
    folder = made.adapter(seed=1)
    combine([folder, folder], tmp_path / "twice", "svd", (1.0, 1.0))
    assert distance(changes_of(tmp_path / "twice"), total([folder], [2.0])) < 1e-6
    combine([folder, folder], tmp_path / "none", "svd", (1.0, -1.0))
    assert all(not change.any() for change in changes_of(tmp_path / "none").values())


def test_the_tokenizer_and_targets_go_along(made: Made, two: list[Path], tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "layers", made.base(), 3, target_modules=["q_proj"], layers_to_transform=[1])
    (other / "chat_template.jinja").write_text("x")
    combine([two[0], other], tmp_path / "out", "cat")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    modules = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("mlp.down_proj", "self_attn.q_proj")]
    assert (config["target_modules"], config["layers_to_transform"]) == (modules, None)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "x"
    assert (
        distance(changes_in(loaded(made.base(), [two[0], tmp_path / "out"]), "a1"), total([two[0], other], WEIGHTS))
        < 1e-5
    )
    for folder in two:
        edit_config(folder, base_model_name_or_path="org/llama-7b")
    combine(two, tmp_path / "list", "cat")
    config = json.loads((tmp_path / "list/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj"]
    assert config["base_model_name_or_path"] == "org/llama-7b"


def test_names_that_begin_otherwise_are_warned_of(made: Made, tmp_path: Path) -> None:
    one, two = made.adapter(seed=1), save_adapter(tmp_path / "two", made.base(), 2)
    edit_tensors(two, lambda t: {n.replace("model.layers", "model.language_model.layers"): v for n, v in t.items()})
    (said,) = combine([one, two], tmp_path / "out", "cat").warnings
    assert "model.layers.1.self_attn.q_proj in" in said
    assert "model.language_model.layers.1.self_attn.q_proj in two" in said
    assert not combine([one, made.adapter(seed=2)], tmp_path / "same", "cat").warnings


def test_it_is_a_step_of_recipes(two: list[Path], tmp_path: Path) -> None:
    recipe = {
        "sources": {"one": str(two[0]), "two": str(two[1])},
        "tensors": {
            "both": {"combine-adapters": {"adapter": ["one", "two"], "method": "cat", "weight": list(WEIGHTS)}},
            "small": {"resize-adapter": {"adapter": "both", "rank": 3}},
        },
        "outputs": {str(tmp_path / "out"): {"from": "small"}},
    }
    weightops.run(recipe)
    combine(two, tmp_path / "svd", "svd", rank=3)
    assert distance(changes_of(tmp_path / "out"), changes_of(tmp_path / "svd")) < 1e-6
