"""Experts and Conv1D as linear layers: the results of transformers' own modules, names of checkpoints, what is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import save_mixture
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, tiny
from torch import Tensor, nn
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from weightops.errors import IncompatibleInputs
from weightops.formats.folder import open_checkpoint
from weightops.inference.linears import Experts, expert_weights, left_as_they_are, make_linears, routers
from weightops.inference.model import BlockModel
from weightops.layouts.skeleton import place

TOKENS = torch.randint(2, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
COUNT, HIDDEN, INNER = 5, 24, 16
CLASSES = (MixtralExperts, MiniMaxM3VLExperts, NemotronHExperts)
"""Gated; gated with clamps of their own; without gates."""
pytestmark = pytest.mark.usefixtures("one_thread")


def config(implementation: str) -> SimpleNamespace:
    return SimpleNamespace(
        num_local_experts=COUNT,
        n_routed_experts=COUNT,
        hidden_size=HIDDEN,
        moe_latent_size=None,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_limit=0.5,
        swiglu_alpha=1.7,
        _experts_implementation=implementation,
    )


def stacked(kind: type[nn.Module], implementation: str = "eager") -> nn.Module:
    """transformers' experts, with weights."""
    module = kind(config(implementation))
    numbers = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=numbers)
    return module.requires_grad_(False)


def taken_apart(module: nn.Module) -> Experts:
    """The same as linear layers, with the same weights."""
    model, whole = nn.ModuleDict({"experts": module}), dict(module.named_parameters())
    make_linears(model)
    for name, (shape, weights) in expert_weights(model).items():
        tensor = whole[name.removeprefix("experts.")]
        assert tensor.shape == shape
        for weight, part in zip(weights, tensor.reshape(-1, shape[-1]).chunk(len(weights)), strict=True):
            place(model, weight, nn.Parameter(part, requires_grad=False))
    experts = model["experts"]
    assert isinstance(experts, Experts)
    return experts


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("odd", ["has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"])
def test_experts_that_are_odd_in_one_way_are_left_whole(kind: type[nn.Module], odd: str) -> None:
    module = stacked(kind)
    setattr(module, odd, odd != "is_concatenated")
    model = nn.ModuleDict({"experts": module})
    make_linears(model)
    assert model["experts"] is module
    assert expert_weights(model) == {}


@pytest.mark.parametrize("kind", CLASSES)
def test_so_are_experts_with_another_parameter_buffer_or_shape(kind: type[nn.Module]) -> None:
    extra, buffered, uneven, flat = (stacked(kind) for _ in range(4))
    extra.register_parameter("scale", nn.Parameter(torch.ones(1)))
    buffered.register_buffer("seen", torch.ones(1))
    uneven.down_proj = nn.Parameter(torch.ones(COUNT, HIDDEN + 1, INNER))
    flat.down_proj = nn.Parameter(torch.ones(COUNT * HIDDEN, INNER))
    for module in (extra, buffered, uneven, flat):
        model = nn.ModuleDict({"experts": module})
        make_linears(model)
        assert model["experts"] is module


@st.composite
def routed(draw: st.DrawFn, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and which experts up to number `most` get them, with what weights."""
    tokens, chosen = draw(st.integers(0, 7)), draw(st.integers(1, 3))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    index = torch.stack([torch.randperm(most, generator=numbers)[:chosen] for _ in range(tokens)] or [torch.empty(0)])
    states = torch.randn(tokens, HIDDEN, generator=numbers)
    return states, index.long().view(tokens, chosen), torch.rand(tokens, chosen, generator=numbers)


@pytest.mark.parametrize("kind", CLASSES)
@given(data=st.data())
def test_experts_give_what_transformers_gives(kind: type[nn.Module], data: st.DataObject) -> None:
    """One index too large is transformers' sign for none, where there is such a sign."""
    states, index, weights = data.draw(routed(COUNT if kind is NemotronHExperts else COUNT + 1))
    found = taken_apart(stacked(kind))(states, index, weights)
    torch.testing.assert_close(found, stacked(kind)(states, index, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_in_its_default_order_to_the_bit(kind: type[nn.Module]) -> None:
    numbers = torch.Generator().manual_seed(2)
    states, weights = torch.randn(40, HIDDEN, generator=numbers), torch.rand(40, 2, generator=numbers)
    index = torch.stack([torch.randperm(COUNT, generator=numbers)[:2] for _ in range(40)])
    expected = stacked(kind, "grouped_mm")(states, index, weights)
    assert torch.equal(taken_apart(stacked(kind))(states, index, weights), expected)


def test_weights_of_another_type_are_applied_in_it() -> None:
    """Routers compute in float32 whatever the model does."""
    module = taken_apart(stacked(MixtralExperts).bfloat16())
    states, index = torch.randn(6, HIDDEN).bfloat16(), torch.tensor([[0, 1]] * 6)
    assert module(states, index, torch.rand(6, 2)).dtype is torch.bfloat16


def test_gate_and_up_are_given_one_tensor_and_others_are_not_called() -> None:
    experts = taken_apart(stacked(MixtralExperts))
    seen: dict[str, Tensor] = {}
    for name, layer in experts.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    experts(torch.randn(4, HIDDEN), torch.tensor([[1, 3]] * 4), torch.rand(4, 2))
    assert list(seen) == [
        *(f"{i}.{layer}_proj" for i in (1, 3) for layer in ("gate", "up")),
        *(f"{i}.down_proj" for i in (1, 3)),
    ]
    assert seen["1.gate_proj"] is seen["1.up_proj"]
    assert seen["3.gate_proj"] is seen["3.up_proj"]


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = BlockModel(open_checkpoint(folder))
    with model.loaded("", *model.blocks):
        found: Tensor = model.module(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", ["qwen2_moe", "granitemoe", "gpt_oss"])
def test_whole_models_give_what_transformers_gives(tmp_path: Path, kind: str) -> None:
    model = save_mixture(tmp_path, kind)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("kind", "layer", "name", "routing"),
    [
        ("mixtral", "mlp.experts.3.up_proj", "block_sparse_moe.experts.3.w3", {"mlp.gate"}),
        ("qwen2_moe", "mlp.experts.7.gate_proj", None, {"mlp.gate", "mlp.shared_expert_gate"}),
        ("granitemoe", "block_sparse_moe.experts.2.down_proj", None, {"block_sparse_moe.router"}),
        ("gpt2", "attn.c_attn", None, set()),
    ],
)
def test_layers_have_the_names_of_checkpoints_and_routers_are_known(
    tmp_path: Path, kind: str, layer: str, name: str | None, routing: set[str]
) -> None:
    save_mixture(tmp_path, kind)
    model = BlockModel(open_checkpoint(tmp_path))
    block = model.blocks[1]
    assert isinstance(model.module.get_submodule(f"{block}.{layer}"), nn.Linear)
    assert model.tensor_names(block)[f"{block}.{layer}.weight"] == f"{block}.{name or layer}.weight"
    assert {r.removeprefix(f"{block}.") for r in routers(model.module) if r.startswith(block)} == routing
    assert left_as_they_are(model.module, model.blocks, model.shown) == ()


def test_experts_in_one_tensor_are_split_as_they_lie(tmp_path: Path) -> None:
    save_mixture(tmp_path, "granitemoe")
    state = load_file(tmp_path / "model.safetensors")
    model = BlockModel(open_checkpoint(tmp_path))
    owner = "model.layers.0.block_sparse_moe"
    assert f"{owner}.input_linear.weight" in state
    assert not any("_linear" in name for name in model.checkpoint)
    model.load(f"{owner}.experts")
    found = [model.module.get_parameter(f"{owner}.experts.3.{layer}_proj.weight") for layer in ("gate", "up", "down")]
    expected = [*state[f"{owner}.input_linear.weight"][3].chunk(2), state[f"{owner}.output_linear.weight"][3]]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_conv1d_has_its_weight_the_other_way_round(tmp_path: Path) -> None:
    save_mixture(tmp_path, "gpt2")
    name = "transformer.h.1.attn.c_proj"  # square: shapes do not tell
    model = BlockModel(open_checkpoint(tmp_path))
    model.load(name)
    stored = load_file(tmp_path / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(model.module.get_parameter(f"{name}.weight"), stored.T)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", [64, 256]),
        ("granitemoe", "model.layers.1.block_sparse_moe.input_linear.weight", [4, 192, 64]),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight", [64, 96]),
    ],
)
def test_other_shapes_are_refused_as_files_have_them(tmp_path: Path, kind: str, name: str, expected: list[int]) -> None:
    save_mixture(tmp_path, kind)
    state = load_file(tmp_path / "model.safetensors")
    state[name] = state[name][..., :-8].contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleInputs, match=r"has the shape .*, expected .* by config.json") as caught:
        BlockModel(open_checkpoint(tmp_path))
    found = [*expected[:-1], expected[-1] - 8]
    assert f"{name} has the shape {found}, expected {expected} by config.json" in str(caught.value)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    save_mixture(tmp_path, "qwen2_moe")
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleInputs, match=r"lacks model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        BlockModel(open_checkpoint(tmp_path))


def test_what_cannot_be_taken_apart_is_told_with_its_share(tmp_path: Path) -> None:
    save_mixture(tmp_path, "gpt_oss")
    model = BlockModel(open_checkpoint(tmp_path))
    (warning,) = left_as_they_are(model.module, model.blocks, "some/model")
    experts = sum(p.numel() for n, p in model.module.named_parameters() if n.endswith("_up_proj") or "down_proj" in n)
    share = experts / sum(p.numel() for n, p in model.module.named_parameters() if ".layers." in n)
    assert warning.startswith(f"some/model: 4 tensors, {share:.0%} of the weights of its blocks, stay as they are")
    assert "model.layers.0.mlp.experts.gate_up_proj [4, 64, 192] of GptOssExperts" in warning
    assert "model.layers.1.mlp.router" in routers(model.module)


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_of_plain_models_nothing_is_left(kind: str) -> None:
    model = tiny(kind)
    make_linears(model)
    blocks = ["transformer.h.0", "transformer.h.1"] if kind != "llama" else ["model.layers.0", "model.layers.1"]
    assert left_as_they_are(model, blocks, kind) == ()
