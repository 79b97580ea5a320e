"""Quantising what transformers does not keep as linear layers: experts of mixtures, and GPT-2's Conv1D."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import save_mixture
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM

import weightops
from weightops.api.models import Quantization, evaluate, quantize
from weightops.formats.folder import open_checkpoint
from weightops.inference.model import BlockModel

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"group_size": 32, "samples": 20, "seq_len": 64}
TOKENS = torch.randint(2, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ATTENTION = {f"self_attn.{letter}_proj" for letter in "qkvo"}
LAYERS = {
    "mixtral": _ATTENTION | {f"block_sparse_moe.experts.{i}.w{n}" for i in range(4) for n in (1, 2, 3)},
    "qwen2_moe": _ATTENTION
    | {f"mlp.experts.{i}.{n}_proj" for i in range(8) for n in ("gate", "up", "down")}
    | {f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")},
    "granitemoe": _ATTENTION
    | {f"block_sparse_moe.experts.{i}.{n}_proj" for i in range(4) for n in ("gate", "up", "down")},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}
"""What is quantised of a block, by its name in files."""
_STACKED = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")


@dataclass(frozen=True)
class Made:
    source: Path
    out: Path
    done: Quantization


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], Made]:
    """A model of some kind and what it was quantised to, made when it is first asked for."""
    found: dict[str, Made] = {}

    def make(kind: str) -> Made:
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind)
            save_mixture(folder / "model", kind)
            done = quantize(folder / "model", folder / "out", calibration=[text], **SMALL)
            found[kind] = Made(folder / "model", folder / "out", done)
        return found[kind]

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", LAYERS)
def test_every_matrix_but_routers_is_quantised_under_its_name_and_the_rest_stays(
    made: Callable[[str], Made], kind: str
) -> None:
    source, out = tensors(made(kind).source), tensors(made(kind).out)
    prefix = "transformer.h" if kind == "gpt2" else "model.layers"
    layers = {f"{prefix}.{i}.{name}" for i in range(2) for name in LAYERS[kind]}
    packed = {name for name in out if name.endswith(PARTS)}
    assert packed == {f"{layer}.{part}" for layer in layers for part in PARTS}
    kept = {n: t for n, t in source.items() if n.removesuffix(".weight") not in layers and not n.endswith(_STACKED)}
    assert kept.keys() == out.keys() - packed
    assert all(torch.equal(tensor, out[name]) for name, tensor in kept.items())
    assert weightops.check(made(kind).out).verdict


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_solved_better_than_by_rounding(made: Callable[[str], Made], kind: str) -> None:
    modules = made(kind).done.modules
    assert [m.fallback for m in modules if m.fallback] == []
    assert sum(m.error or 0 for m in modules) < 0.9 * sum(m.error_rtn or 0 for m in modules)
    routed = {m.module: m.tokens for m in modules if ".experts." in m.module and m.module.endswith("gate_proj")}
    assert sum(routed.values()) == (20 * 64 * 2 * 2 if routed else 0)  # two experts for each token, in two blocks


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = BlockModel(open_checkpoint(folder))
    with model.loaded("", *model.blocks):
        found: torch.Tensor = model.module(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", LAYERS)
def test_the_folder_and_what_it_is_dequantised_to_give_the_same(
    made: Callable[[str], Made], tmp_path: Path, kind: str
) -> None:
    weightops.dequantize(made(kind).out, tmp_path / "plain")
    found = logits(made(kind).out)
    assert torch.equal(logits(tmp_path / "plain"), found)
    if kind != "granitemoe":  # which transformers reads with its experts in one tensor only
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
            assert torch.equal(model(TOKENS, use_cache=False).logits, found)


def test_output_errors_are_measured_of_each_expert(made: Callable[[str], Made], text: Path) -> None:
    one = made("mixtral")
    _, score = evaluate([one.out], text, seq_len=64, reference=one.source).scores
    assert score.agreement is not None
    assert score.agreement.modules.keys() == {m.module for m in one.done.modules}
    assert 0 < score.agreement.kl_mean < 1


def test_an_expert_that_no_token_came_to_is_rounded_and_told(text: Path, tmp_path: Path) -> None:
    save_mixture(tmp_path / "model", "mixtral")
    state = tensors(tmp_path / "model")
    for name in state:
        if name.endswith("block_sparse_moe.gate.weight"):
            state[name].zero_()  # of equals the same two are always taken
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    done = quantize(tmp_path / "model", tmp_path / "out", calibration=[text], **SMALL)
    left = {m.module for m in done.modules if m.tokens == 0}
    assert len(left) == 2 * 2 * 3
    assert {m.module for m in done.modules if m.fallback == "no calibration token came to it"} == left


def test_experts_of_an_unknown_form_stay_with_a_warning(made: Callable[[str], Made]) -> None:
    one = made("gpt_oss")
    assert {m.module.rpartition("self_attn.")[2] for m in one.done.modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert one.done.result is not None
    assert any("84% of the weights of its blocks, stay as they are" in w for w in one.done.result.warnings)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(tensors(one.source)[name], tensors(one.out)[name])
