"""One model in every form finds itself again: layouts, containers, shards, ties, experts, Conv1D, quantised types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_model import make_meta
from mixtures import save_mixture
from safetensors.torch import load_file, save_file
from small_tokenizers import sentencepiece_model
from support import given_tensor, write_checkpoint
from tiny_models import save_tiny

import weightops
from weightops.checkpoint import Checkpoint
from weightops.formats.folder import open_checkpoint
from weightops.operations.compare import Comparison, compare

SIZES: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256, "vocab": 1500}
LAYOUTS = ("meta", "meta-2", "hf", "tencentpretrain", "llama_inference", "gguf")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA model in all layouts, in folders of their names."""
    folder = tmp_path_factory.mktemp("forms")
    make_meta(folder / "meta", **SIZES, parts=1, dtype=torch.float16, tokenizer=sentencepiece_model(), seed=3)
    for name in LAYOUTS[1:]:
        parts = {"model_parallel": 2} if name == "meta-2" else {}
        weightops.convert(
            folder / "meta", folder / name, to=name.removesuffix("-2"), set={"context_length": "128"}, **parts
        )
    return folder


def of(a: Path, b: Path, **options: Any) -> Comparison:
    return compare(open_checkpoint(a), open_checkpoint(b), workers=1, **options)


@pytest.mark.parametrize("one", LAYOUTS)
def test_every_layout_holds_the_same_as_every_other(forms: Path, one: str) -> None:
    for other in LAYOUTS:
        found = of(forms / one, forms / other, tolerance=0, strict=True)
        assert found.differs is False, (one, other, found.relation, found.findings)
        assert not found.changed
        assert len(found.tensors) == 2 * 9 + 3
        assert all(lone.is_derived for lone in found.lone)


def test_a_planted_change_is_found_through_layouts(forms: Path, tmp_path: Path) -> None:
    """One head of q, whose rows lie in another order."""
    shutil.copytree(forms / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.self_attn.q_proj.weight"][16:32] *= 2
    save_file(state, path, {"format": "pt"})
    for layout in ("meta-2", "gguf", "tencentpretrain"):
        (tensor,) = of(forms / layout, tmp_path / "hf").changed
        assert (tensor.kind, [head.head for head in tensor.heads]) == ("heads", [1])


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_ggml_blocks_are_quantised_copies(forms: Path, tmp_path: Path, kind: str) -> None:
    weightops.convert(forms / "hf", tmp_path / "q", to="gguf", dtype=kind)
    found = of(forms / "hf", tmp_path / "q")
    form = {"q8_0": "q8_0", "q4_0": "mostly q4_0"}[kind]  # as llama-quantize does it, the embedding has more bits
    assert found.relation.startswith(f"B is A quantised ({form}) in 16 tensors")
    assert all((each.within_half_step or 0) > 0.9 for each in found.tensors if each.kind == "quantised")


def test_fp8_with_scales_is_a_quantised_copy(forms: Path, tmp_path: Path) -> None:
    weightops.cast(forms / "hf", tmp_path / "fp8", scheme="fp8")
    found = of(forms / "hf", tmp_path / "fp8")
    assert found.relation.startswith("B is A quantised (fp8, one scale a row) in 14 tensors; the other")
    assert all((each.within_half_step or 0) > 0.999 for each in found.tensors if each.kind == "quantised")
    assert not found.unpaired


def test_shards_and_containers_are_no_difference(forms: Path, tmp_path: Path) -> None:
    weightops.shard(forms / "hf", tmp_path / "torch", format="torch", max_shard_size="100KB")
    found = of(forms / "hf", tmp_path / "torch", tolerance=0)
    assert found.relation == "B holds the same weights as A, byte for byte."


def test_a_tied_head_is_its_embedding(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    shutil.copytree(tmp_path / "tied", tmp_path / "untied")
    state = load_file(tmp_path / "tied/model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "untied/model.safetensors", {"format": "pt"})
    found = of(tmp_path / "tied", tmp_path / "untied", tolerance=0)
    assert found.differs is False
    state["lm_head.weight"][5] += 1
    save_file(state, tmp_path / "untied/model.safetensors", {"format": "pt"})
    (tensor,) = of(tmp_path / "tied", tmp_path / "untied").changed
    assert (tensor.b.name, tensor.kind, tensor.rows[0].row) == ("lm_head.weight", "rows", 5)
    config = json.loads((tmp_path / "tied/config.json").read_text())
    (tmp_path / "tied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert [lone.name for lone in of(tmp_path / "tied", tmp_path / "untied").unpaired] == ["lm_head.weight"]


def test_experts_are_the_same_stacked_or_apart(tmp_path: Path) -> None:
    save_mixture(tmp_path / "apart", "mixtral")
    state = load_file(tmp_path / "apart/model.safetensors")
    stacked: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if ".experts." not in name:
            stacked[name.replace("block_sparse_moe", "mlp")] = tensor
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        w1, w2, w3 = (
            [state[f"{prefix}.block_sparse_moe.experts.{i}.{w}.weight"] for i in range(4)] for w in ("w1", "w2", "w3")
        )
        stacked[f"{prefix}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        )
        stacked[f"{prefix}.mlp.experts.down_proj"] = torch.stack(w2)
    write_checkpoint(tmp_path / "stacked", stacked, json.loads((tmp_path / "apart/config.json").read_text()))
    found = of(tmp_path / "apart", tmp_path / "stacked", tolerance=0)
    assert found.differs is False
    assert found.kinds == {"identical": len(state)}
    # Two experts exchanged: in the stack they are rows of one tensor.
    down = stacked["model.layers.1.mlp.experts.down_proj"]
    stacked["model.layers.1.mlp.experts.down_proj"] = down[[0, 3, 2, 1]]
    write_checkpoint(tmp_path / "swapped", stacked, json.loads((tmp_path / "apart/config.json").read_text()))
    changed = of(tmp_path / "stacked", tmp_path / "swapped").changed
    assert {(each.name, each.kind, each.moved_from) for each in changed} == {
        (f"model.layers.1.mlp.experts.down_proj[{i}]", "moved", f"model.layers.1.mlp.experts.down_proj[{j}]")
        for i, j in ((1, 3), (3, 1))
    }


def test_columns_of_conv1d_are_rows_of_linear_layers(tmp_path: Path) -> None:
    save_tiny(tmp_path / "gpt2", "gpt2")
    state = load_file(tmp_path / "gpt2/model.safetensors")
    turned = {
        name: tensor.T.contiguous() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
        for name, tensor in state.items()
    }
    write_checkpoint(tmp_path / "linear", {n.removeprefix("transformer."): t for n, t in turned.items()})
    found = of(tmp_path / "gpt2", tmp_path / "linear", tolerance=0)
    assert found.differs is False  # also of c_proj, which is square


def test_an_encoder_is_not_taken_for_a_decoder() -> None:
    one, other = (
        Checkpoint(part, {f"{part}.layers.{i}.weight": given_tensor(torch.ones(4, 4)) for i in range(3)})
        for part in ("vision", "text")
    )
    found = compare(one, other)
    assert (len(found.tensors), len(found.unpaired)) == (0, 6)


def test_names_of_wrappers_and_of_parts_in_another_order_are_no_difference() -> None:
    tensors = {f"model.language_model.layers.{i}.weight": given_tensor(torch.full((4, 4), float(i))) for i in range(3)}
    for change in (("model.language_model.", "language_model.model."), ("model.", "_orig_mod.model.")):
        renamed = {name.replace(*change, 1): tensor for name, tensor in tensors.items()}
        found = compare(Checkpoint("a", tensors), Checkpoint("b", renamed), tolerance=0)
        assert found.differs is False, change


def test_what_is_not_read_is_named_and_not_guessed_at(tmp_path: Path) -> None:
    state = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 8, dtype=torch.int32), "norm.weight": torch.ones(8)}
    config = {"quantization_config": {"quant_method": "aqlm"}}
    write_checkpoint(tmp_path / "aqlm", state, config)
    write_checkpoint(
        tmp_path / "plain", {"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 64), "norm.weight": torch.ones(8)}
    )
    found = of(tmp_path / "plain", tmp_path / "aqlm")
    assert {lone.name.rpartition(".")[2] for lone in found.unpaired} == {"weight", "qweight"}
    assert any("quant_method aqlm (codebooks), which is not read" in note for note in found.notes)


def test_thousands_of_first_parts_are_no_burden() -> None:
    one, other = (
        Checkpoint(side, {f"{side}{i}.x{i}.weight": given_tensor(torch.zeros(1)) for i in range(3000)}) for side in "ab"
    )
    assert len(compare(one, other).unpaired) == 6000
