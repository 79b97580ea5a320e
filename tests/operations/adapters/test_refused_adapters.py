"""What commands on adapters refuse, before anything is written, and by which name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Made, config_of, edit_config, edit_tensors, save_adapter, save_model, state
from safetensors.torch import save_file

import weightops
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError, WeightopsError

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(function: Callable[..., Any], sources: Any, folder: Path, **options: Any) -> WeightopsError:
    """The error of a call that is refused and leaves no traces."""
    with pytest.raises(WeightopsError, match=r".") as caught:  # callers look at the sentence
        function(sources, folder / "refused", **options)
    assert not list(folder.glob("refused*"))
    return caught.value


@pytest.fixture
def pair(made: Made, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(made.adapter(seed=seed), tmp_path / str(seed))) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": (1.0,)}, "there are 1 weights for 2 adapters"),
        ({"weight": (1.0, math.nan)}, "a weight must be a finite number"),
        ({"method": "ties"}, "ties needs a density"),
        ({"density": 0.5}, "a density has no use for cat"),
        ({"method": "ties", "density": 0.0}, "a density of 0 is no share"),
        ({"method": "dare_linear", "density": 1.5}, "a density of 1.5 is no share"),
        ({"rank": 4}, "a rank has no use for cat"),
        ({"method": "svd", "rank": 0}, "a rank of 0 holds nothing"),
        ({"seed": -1}, "the seed -1 does not have 64 bits"),
        ({"dtype": "float8_e4m3fn"}, "an adapter in float8_e4m3fn is not what peft loads"),
        ({"method": "sum"}, "invalid enum value 'sum'"),
        ({"vote": "most", "method": "ties", "density": 0.5}, "invalid enum value 'most'"),
    ],
)
def test_options_that_cannot_be_meant(pair: list[Path], tmp_path: Path, options: dict[str, Any], words: str) -> None:
    error = refused(weightops.combine_adapters, pair, tmp_path, **options)
    assert isinstance(error, UsageError)
    assert words in str(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "neither a rank nor a share is given"),
        ({"rank": 0}, "a rank of 0 holds nothing"),
        ({"keep": 1.5}, "1.5 is no share"),
        ({"keep": 0.5, "by": "sv_ratio"}, "a ratio of 0.5 of the largest singular value"),
        ({"rank": 2, "by": "sv_fro"}, "sv_fro measures what is kept"),
        ({"rank": 2, "seed": 1 << 64}, "does not have 64 bits"),
    ],
)
def test_ranks_that_cannot_be_meant(made: Made, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    error = refused(weightops.resize_adapter, made.adapter(seed=1), tmp_path, **options)
    assert isinstance(error, UsageError)
    assert words in str(error)


def test_adapters_of_other_models(made: Made, pair: list[Path], tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", config_of("gpt2"))
    wide = save_adapter(tmp_path / "gpt2", other, target_modules=["c_attn"])
    edit_tensors(
        pair[1], lambda tensors: {n: torch.cat([t, t]) if "q_proj.lora_B" in n else t for n, t in tensors.items()}
    )
    error = refused(weightops.combine_adapters, pair, tmp_path)
    assert isinstance(error, IncompatibleInputs)
    assert "model.layers.0.self_attn.q_proj: the changes are [72, 72] in 1 and [144, 72] in 2" in str(error)
    result = weightops.combine_adapters([pair[0], wide], tmp_path / "out")
    assert "the adapters were trained on bases of other names" in result.warnings[0]


def test_other_ranks_where_factors_are_added(made: Made, pair: list[Path], tmp_path: Path) -> None:
    for method, options in (("linear", {}), ("ties", {"density": 0.5})):
        error = refused(
            weightops.combine_adapters, [pair[0], made.adapter(seed=3, r=6)], tmp_path, method=method, **options
        )
        assert f"model.layers.0.mlp.down_proj: {method} adds up factors of one rank, found 4 in 1, 6 in" in str(error)


def test_magnitudes(made: Made, pair: list[Path], tmp_path: Path) -> None:
    dora = made.adapter(seed=4, use_dora=True)
    for function, source in ((weightops.combine_adapters, [pair[0], dora]), (weightops.resize_adapter, dora)):
        error = refused(function, source, tmp_path, **({"rank": 2} if function is weightops.resize_adapter else {}))
        assert isinstance(error, IncompatibleInputs)
        assert "model.layers.0.mlp.down_proj has a magnitude (DoRA)" in str(error)
    error = refused(weightops.convert_adapter, dora, tmp_path, to="mlx")
    assert "has a magnitude (DoRA), which mlx-lm has no place for" in str(error)


def test_two_that_hold_one_module_whole(made: Made, tmp_path: Path) -> None:
    folders = [made.adapter(seed=seed, modules_to_save=["lm_head"]) for seed in (1, 2)]
    error = refused(weightops.combine_adapters, folders, tmp_path)
    assert "both hold lm_head.weight whole, with other values" in str(error)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties_svd"])
def test_values_that_are_no_numbers(pair: list[Path], tmp_path: Path, method: str) -> None:
    name = f"{Q}.lora_B.weight"
    edit_tensors(pair[1], lambda tensors: {**tensors, name: tensors[name].index_fill(0, torch.tensor([3]), math.nan)})
    options = {"density": 0.5} if "ties" in method else {}
    error = refused(weightops.combine_adapters, pair, tmp_path, method=method, **options)
    assert isinstance(error, CorruptInput)
    assert f"2: {name} holds values that are no numbers" in str(error)
    for function, more in ((weightops.resize_adapter, {"rank": 2}), (weightops.convert_adapter, {"to": "mlx"})):
        assert f"{name} holds values that are no numbers" in str(refused(function, pair[1], tmp_path, **more))


def test_what_is_no_adapter(made: Made, pair: list[Path], tmp_path: Path) -> None:
    weightops.diff(made.base(), made.base(), tmp_path / "delta")
    integers = {n: t.to(torch.int8) for n, t in state(pair[0]).items()}
    save_file(integers, pair[1] / "adapter_model.safetensors")
    for source, error, words in (
        (made.base(), SourceMissing, "has no adapter_config.json"),
        (tmp_path / "delta", WeightopsError, "delta"),
        (pair[1], IncompatibleInputs, "expected floating-point numbers"),
    ):
        for found in (
            refused(weightops.combine_adapters, [pair[0], source], tmp_path),
            refused(weightops.resize_adapter, source, tmp_path, rank=2),
        ):
            assert isinstance(found, error)
            assert words in str(found)
    for source, words in (
        (made.base(), "is this a model?"),
        (tmp_path / "delta", "delta"),
        (pair[1], "expected floating"),
    ):
        found = refused(weightops.convert_adapter, source, tmp_path, to="mlx")
        assert words in f"{found} {found.hint}"
    found = refused(weightops.convert_adapter, pair[0], tmp_path, to="torchtune", base=pair[0])
    assert "is a LoRA adapter, not a model" in str(found)


@pytest.mark.parametrize("program", ["torchtune", "mlx", "lit", "kohya"])
def test_adapters_of_other_programs_are_to_be_converted(pair: list[Path], tmp_path: Path, program: Any) -> None:
    weightops.convert_adapter(
        pair[1], tmp_path / "other", to=program, **({"heads": 6} if program == "torchtune" else {})
    )
    for function, source, more in (
        (weightops.combine_adapters, [pair[0], tmp_path / "other"], {}),
        (weightops.resize_adapter, tmp_path / "other", {"rank": 2}),
    ):
        error = refused(function, source, tmp_path, **more)
        assert f"other: is an adapter by the names of {program}, expected peft's" in str(error)
        assert error.hint == "weightops adapter convert other --to peft"


def test_ranks_that_the_config_contradicts(pair: list[Path], tmp_path: Path) -> None:
    edit_config(pair[1], r=8)
    error = refused(weightops.combine_adapters, pair, tmp_path)
    assert isinstance(error, CorruptInput)
    assert "model.layers.0.mlp.down_proj: lora_A is float32 [4, 200], adapter_config.json says r = 8" in str(error)


def test_weights_that_were_trained_beside(pair: list[Path], tmp_path: Path) -> None:
    torch.save({"base_model.model.extra.weight": torch.ones(2)}, pair[0] / "non_lora_trainables.bin")
    error = refused(weightops.combine_adapters, pair, tmp_path)
    assert "1/non_lora_trainables.bin: was trained with the adapter and holds extra.weight" in str(error)


def test_biases_that_only_some_have(made: Made, tmp_path: Path) -> None:
    biased = made.adapter("biased", seed=1, lora_bias=True, target_modules=["q_proj"])
    plain = made.adapter("biased", seed=2, target_modules=["v_proj"])
    error = refused(weightops.combine_adapters, [biased, plain], tmp_path)
    assert "model.layers.0.self_attn.q_proj has a bias (lora_bias) in one adapter" in str(error)
    error = refused(weightops.combine_adapters, [biased, biased], tmp_path, method="linear")
    assert "for which linear has no rule" in str(error)
    error = refused(weightops.convert_adapter, biased, tmp_path, to="kohya")
    assert "a bias (lora_bias), which sd-scripts has no place for" in str(error)


# --- conversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "settings", "options", "words"),
    [
        ("torchtune", {}, {}, "its rows are in another order in torchtune, by heads, and nothing says how many"),
        ("torchtune", {}, {"heads": 7}, "no whole number of heads"),
        ("torchtune", {"target_modules": ["embed_tokens"]}, {}, "an embedding, which torchtune has no place for"),
        ("lit", {"target_modules": ["embed_tokens"]}, {}, "an embedding, which LitGPT has no place for"),
        ("kohya", {"target_modules": ["embed_tokens"]}, {}, "an embedding, which sd-scripts has no place for"),
        (
            "mlx",
            {"modules_to_save": ["lm_head"]},
            {},
            "holds base_model.model.lm_head.weight beside factors, which mlx",
        ),
        ("kohya", {}, {"alpha": 3}, "alpha has no use: peft's adapters say it themselves"),
        ("mlx", {}, {"alpha": math.inf}, "an alpha of inf is no scale"),
    ],
)
def test_what_a_program_has_no_place_for(
    made: Made, tmp_path: Path, to: str, settings: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    assert words in str(
        refused(weightops.convert_adapter, made.adapter(seed=1, **settings), tmp_path, to=to, **options)
    )


@pytest.mark.parametrize("to", ["torchtune", "lit"])
def test_modules_of_other_architectures(made: Made, tmp_path: Path, to: str) -> None:
    source = made.adapter("gpt2", seed=1, target_modules=["c_fc"])
    error = refused(weightops.convert_adapter, source, tmp_path, to=to)
    assert "transformer.h.0.mlp.c_fc: what this is called in" in str(error)


def test_experts_have_no_place_elsewhere(made: Made, tmp_path: Path) -> None:
    source = made.adapter("mixtral", seed=1, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    error = refused(weightops.convert_adapter, source, tmp_path, to="mlx")
    assert "model.layers.0.mlp.experts.down_proj is or has the factors of stacked experts" in str(error)


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


A, B = torch.ones(4, 8), torch.ones(8, 4)
KOHYA = {"lora_te_a_b.lora_down.weight": A, "lora_te_a_b.lora_up.weight": B}
MLX = {"x.lora_a": B, "x.lora_b": A}
TUNE = {"layers.0.attn.x.lora_a.weight": A, "layers.0.attn.x.lora_b.weight": B}
LIT = {"lm_head.lora_A": A, "lm_head.lora_B": B}
QKV = "transformer.h.0.attn.qkv.lora_"
TWO = {f"{QKV}A": torch.ones(8, 8), f"{QKV}B": B}
THREE = {f"{QKV}A": torch.ones(12, 8), f"{QKV}B": torch.ones(24, 4)}


@pytest.mark.parametrize(
    ("tensors", "config", "options", "words"),
    [
        (KOHYA, None, {}, "where its underscores are dots is known of LLaMA's and CLIP's names alone"),
        (KOHYA, None, {"base": {"a_b.weight": A, "a.b.weight": A}}, "lora_te_a_b may be a.b or a_b of the base"),
        (KOHYA, None, {"base": {"a.c.weight": A}}, "lora_te_a_b is no module of the base"),
        ({**KOHYA, **MLX}, None, {}, "holds names of kohya and mlx at once"),
        ({**KOHYA, "lora_te_a_b.alpha": A}, None, {}, "an alpha is float32 [4, 8], expected one number"),
        ({"lora_te_a.lora_down.weight": A}, None, {}, "lora_te_a has no lora_up.weight"),
        ({**KOHYA, "lora_te_a_b.dora_scale": A}, None, {}, "lora_te_a_b.dora_scale is no part of an adapter"),
        (MLX, {}, {}, "nothing says what the scale is"),
        ({**MLX, "x.lora_b": B}, None, {"alpha": 1}, "are not of one rank"),
        (MLX, {"fine_tune_type": "dora"}, {}, "fine_tune_type dora, expected lora"),
        ({**MLX, "x.lora_a": B.int()}, None, {"alpha": 1}, "x.lora_a is int32 [8, 4], expected floating"),
        ({n: t[None] for n, t in MLX.items()}, None, {"alpha": 1}, "those of stacked experts"),
        (TUNE, None, {"alpha": 1}, "layers.0.attn.x: what this is called in transformers"),
        (TUNE, None, {}, "nothing says what lora_alpha is"),
        (LIT, None, {}, "nothing says what lora_alpha is"),
        (TWO, None, {"alpha": 1}, "holds the factors of 2 of q, k and v, and hyperparameters.yaml names none"),
        (THREE, None, {"alpha": 1}, "nothing says how many rows each has"),
    ],
)
def test_adapters_of_other_programs(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: Any, options: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "source", tensors, config)
    if "base" in options:
        options = {**options, "base": write(tmp_path / "base", options["base"])}
    assert words in str(refused(weightops.convert_adapter, source, tmp_path, to="peft", **options))
