"""Adapters under the names of other programs: there and back to the bit, and what each of them changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_sums import PREFIX, changes_in, changes_of, distance, loaded
from adapters import LINEAR, Made, State, edit_config, edit_tensors, state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weightops

HEADS, GROUPS, SIZE = 6, 2, 12
PROGRAMS = ("torchtune", "lit", "mlx", "kohya")


@pytest.fixture(scope="module")
def source(made: Made) -> Path:
    """Factors of all linear layers and the head, of one rank and scale; without the head's weight of the base."""
    folder = made.adapter(seed=1, target_modules=[*LINEAR, "lm_head"])
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if "base_layer" not in n})
    return folder


def convert(source: Path, out: Path, to: Any, **options: Any) -> Path:
    weightops.convert_adapter(source, out, to=to, **options)
    return out


def module(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = state(folder)
    return tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_there_and_back_is_the_same_to_the_bit(made: Made, source: Path, tmp_path: Path, program: str) -> None:
    there = convert(source, tmp_path / "there", program, base=made.base())
    back = convert(there, tmp_path / "back", "peft", base=made.base())
    old, new = state(source), state(back)
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    config = json.loads((back / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, sorted([*LINEAR, "lm_head"]))
    assert distance(changes_in(loaded(made.base(), [source, back]), "a1"), changes_of(source)) < 1e-6


@pytest.mark.parametrize("first", PROGRAMS)
@pytest.mark.parametrize("second", PROGRAMS)
def test_from_any_to_any(made: Made, source: Path, tmp_path: Path, first: str, second: str) -> None:
    one = convert(source, tmp_path / "one", first, base=made.base())
    two = convert(one, tmp_path / "two", second, base=made.base())
    direct = convert(source, tmp_path / "direct", second, base=made.base())
    names = {"lit": "lit_model.pth.lora", "mlx": "adapters.safetensors", "kohya": "lora.safetensors"}
    name = names.get(second, "adapter_model.safetensors")
    assert (two / name).read_bytes() == (direct / name).read_bytes()


def test_torchtune_has_rows_in_pairs(made: Made, source: Path, tmp_path: Path) -> None:
    """As `tune_to_peft_adapter_weights` of torchtune takes them back."""
    tensors = state(convert(source, tmp_path / "out", "torchtune", heads=HEADS))
    for name, heads in (("q_proj", HEADS), ("k_proj", GROUPS)):
        b = tensors[f"layers.1.attn.{name}.lora_b.weight"]
        halves = b.view(heads, SIZE // 2, 2, 4).transpose(1, 2).reshape(heads * SIZE, 4)
        assert torch.equal(halves, module(source, f"model.layers.1.self_attn.{name}")[1])
        assert not torch.equal(b, halves)
    assert torch.equal(tensors["layers.0.mlp.w2.lora_a.weight"], module(source, "model.layers.0.mlp.down_proj")[0])
    assert torch.equal(tensors["output.lora_b.weight"], module(source, "lm_head")[1])
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)


def test_mlx_multiplies_from_the_other_side(source: Path, tmp_path: Path) -> None:
    """As `LoRALinear.fuse` of mlx-lm: scale * lora_b^T lora_a^T."""
    folder = convert(source, tmp_path / "out", "mlx")
    tensors, config = (
        load_file(folder / "adapters.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    scale = config["lora_parameters"]["scale"]
    found = {
        name.removesuffix(".lora_a"): scale * tensors[name.replace("lora_a", "lora_b")].double().T @ a.double().T
        for name, a in tensors.items()
        if name.endswith("lora_a")
    }
    assert distance(found, changes_of(source)) < 1e-12
    assert config["fine_tune_type"] == "lora"
    assert config["lora_parameters"]["keys"] == sorted(
        [*(f"self_attn.{n}" for n in LINEAR[:4]), *(f"mlp.{n}" for n in LINEAR[4:]), "lm_head"]
    )


def lit_change(tensors: State, enabled: list[bool]) -> torch.Tensor:
    """What `LoRAQKVLinear.get_lora_AB` of LitGPT 0.5.12 gives for layer 0, without its scale."""
    a, b = (tensors[f"transformer.h.0.attn.qkv.lora_{letter}"].double() for letter in "AB")
    sizes = [size * SIZE for size, there in zip((HEADS, GROUPS, GROUPS), enabled, strict=True) if there]
    parts = iter([own_b @ own_a for own_a, own_b in zip(a.chunk(len(sizes)), b.split(sizes), strict=True)])
    zeros = [torch.zeros(size * SIZE, a.shape[1], dtype=a.dtype) for size in (HEADS, GROUPS, GROUPS)]
    return torch.cat([next(parts) if there else zero for there, zero in zip(enabled, zeros, strict=True)])


def test_lit_has_q_k_and_v_in_one(made: Made, source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "all", "lit")
    tensors = torch.load(folder / "lit_model.pth.lora")
    exact = changes_of(source)
    qkv = torch.cat([exact[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")])
    torch.testing.assert_close(1.5 * lit_change(tensors, [True] * 3), qkv)
    assert torch.equal(tensors["transformer.h.1.mlp.fc_2.lora_A"], module(source, "model.layers.1.mlp.up_proj")[0])
    assert torch.equal(
        tensors["transformer.h.1.attn.proj.lora_B"], module(source, "model.layers.1.self_attn.o_proj")[1]
    )
    some = made.adapter(seed=2, target_modules=["q_proj", "v_proj", "gate_proj"], layers_to_transform=[0])
    folder = convert(some, tmp_path / "some", "lit", base=made.base())
    tensors, exact = torch.load(folder / "lit_model.pth.lora"), changes_of(some)
    assert tensors["transformer.h.0.attn.qkv.lora_A"].shape == (8, 72)
    q, v = (exact[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "v_proj"))
    wanted = torch.cat([q, torch.zeros(GROUPS * SIZE, 72, dtype=q.dtype), v])
    torch.testing.assert_close(1.5 * lit_change(tensors, [True, False, True]), wanted)
    assert not tensors["transformer.h.1.attn.qkv.lora_B"].any()  # LitGPT has these in all layers
    assert tensors["transformer.h.1.mlp.proj.lora_A"].shape == (4, 200)
    settings = (folder / "hyperparameters.yaml").read_text().splitlines()
    assert {"lora_r: 4", "lora_alpha: 6", "lora_query: true", "lora_key: false", "lora_mlp: true"} <= {*settings}
    back = changes_of(convert(folder, tmp_path / "back", "peft", base=made.base()))
    assert all(not back[name].any() for name in back.keys() - exact.keys())
    assert distance({name: back[name] for name in exact}, exact) < 1e-7


def test_kohya_has_an_alpha_for_each(made: Made, tmp_path: Path) -> None:
    source = made.adapter(seed=3, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 3})
    folder = convert(source, tmp_path / "out", "kohya")
    tensors = load_file(folder / "lora.safetensors")
    found = {}
    for name, down in tensors.items():
        stem, is_down, _ = name.partition(".lora_down.weight")
        if is_down:
            scale = tensors[f"{stem}.alpha"].double() / down.shape[0]
            found[stem] = scale * tensors[f"{stem}.lora_up.weight"].double() @ down.double()
    exact = {f"lora_te_{name.replace('.', '_')}": change for name, change in changes_of(source).items()}
    assert distance(found, exact) < 1e-7
    with safe_open(folder / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora", "Dynamic")
    back = convert(folder / "lora.safetensors", tmp_path / "back", "peft")  # by the table, and as a file
    assert distance(changes_of(back), changes_of(source)) < 1e-7


@pytest.mark.parametrize("program", ["torchtune", "lit", "mlx"])
def test_one_rank_and_scale_for_all_changes_nothing(made: Made, tmp_path: Path, program: str) -> None:
    source = made.adapter(seed=3, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 3})
    result = weightops.convert_adapter(source, tmp_path / "there", to=program, base=made.base())
    assert any("multiplied by what their scale is more than" in said for said in result.warnings)
    back = changes_of(convert(tmp_path / "there", tmp_path / "back", "peft", base=made.base()))
    exact = changes_of(source)
    assert distance({name: back[name] for name in exact}, exact) < 1e-6


def test_embeddings_go_to_mlx(made: Made, tmp_path: Path) -> None:
    source = made.adapter(seed=4, target_modules=["embed_tokens", "q_proj"])
    result = weightops.convert_adapter(source, tmp_path / "there", to="mlx")
    assert "holds the base's own model.embed_tokens.weight" in result.warnings[0]
    assert not weightops.convert_adapter(source, tmp_path / "known", to="mlx", base=made.base()).warnings
    folder = tmp_path / "there"
    tensors = load_file(folder / "adapters.safetensors")
    assert tensors["model.embed_tokens.lora_a"].shape == (101, 4)
    back = convert(folder, tmp_path / "back", "peft")
    factors = {name: tensor for name, tensor in state(source).items() if "lora_" in name}
    assert state(back).keys() == factors.keys()
    assert all(torch.equal(state(back)[name], tensor) for name, tensor in factors.items())


def test_names_with_underscores_are_found_in_a_base(made: Made, tmp_path: Path) -> None:
    source = made.adapter("gpt2", seed=1, target_modules=["c_attn", "c_fc"])
    folder = convert(source, tmp_path / "there", "kohya")
    back = convert(folder, tmp_path / "back", "peft", base=made.base("gpt2"))
    assert state(back).keys() == state(source).keys()


def test_scales_that_files_do_not_say(source: Path, made: Made, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "mlx", "mlx")
    (folder / "adapter_config.json").unlink()
    back = convert(folder, tmp_path / "back", "peft", alpha=6)
    assert distance(changes_of(back), changes_of(source)) < 1e-12
    torchtune = convert(source, tmp_path / "tune", "torchtune", heads=HEADS)
    (tmp_path / "alone").mkdir()
    save_file(state(torchtune), tmp_path / "alone/adapter_0.safetensors")
    back = convert(tmp_path / "alone/adapter_0.safetensors", tmp_path / "again", "peft", heads=HEADS, alpha=6)
    assert distance(changes_of(back), changes_of(source)) < 1e-12


def test_qwen_keeps_its_rows_in_torchtune(source: Path, made: Made, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.norm.weight": torch.ones(4)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_attention_heads": HEADS}))
    tensors = state(convert(source, tmp_path / "out", "torchtune", base=base))
    assert torch.equal(
        tensors["layers.1.attn.q_proj.lora_b.weight"], module(source, "model.layers.1.self_attn.q_proj")[1]
    )


def test_peft_of_peft_is_plain(made: Made, tmp_path: Path) -> None:
    source = made.adapter(seed=5, use_dora=True)
    back = convert(source, tmp_path / "out", "peft")
    assert {n: t.tolist() for n, t in state(back).items()} == {n: t.tolist() for n, t in state(source).items()}
    loaded(made.base(), [made.adapter(seed=1), back])
    edit_config(back, base_model_name_or_path="x")
