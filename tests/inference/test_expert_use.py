"""How experts are used, against loops over transformers' own modules, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, FAMILIES
from mixtures import save_mixture
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import weightops
from weightops.errors import UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference.evaluate import evaluate
from weightops.operations.experts import ExpertUse

TEXT = text(6)
SEQ_LEN = 32


def measured(folder: Path, **options: Any) -> ExpertUse:
    (score,) = evaluate([open_checkpoint(folder)], TEXT, seq_len=SEQ_LEN, experts=True, **options).scores
    assert score.experts is not None
    return score.experts


def expert_output(module: Any, i: int, state: torch.Tensor) -> torch.Tensor:
    """What one expert of transformers' stacked modules gives of one state, by what its eager forward says."""
    if module.is_transposed:  # gpt-oss
        inner = state @ module.gate_up_proj[i] + module.gate_up_proj_bias[i]
        gate, up = inner[::2].clamp(max=module.limit), inner[1::2].clamp(-module.limit, module.limit)
        return ((up + 1) * gate * torch.sigmoid(gate * module.alpha)) @ module.down_proj[i] + module.down_proj_bias[i]
    gate, up = (module.gate_up_proj[i] @ state).chunk(2)
    return module.down_proj[i] @ (module.act_fn(gate) * up)


@torch.no_grad()
def naive(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Frequency and REAP's score of all experts by layer: a loop over tokens and the experts of each."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    found: dict[str, tuple[list[int], list[float]]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts":
            continue
        count = module.down_proj.shape[0]
        tokens, sums = [0] * count, [0.0] * count

        def look(module: Any, args: Any, tokens: list[int] = tokens, sums: list[float] = sums) -> None:
            hidden, chosen, weights = args
            for state, experts, counting in zip(hidden, chosen.tolist(), weights, strict=True):
                for i, weight in zip(experts, counting, strict=True):
                    tokens[i] += 1
                    sums[i] += float(weight * expert_output(module, i, state).norm())

        module.register_forward_pre_hook(look)
        found[name.split("layers.")[1].split(".")[0]] = tokens, sums
    total = len(ids) // SEQ_LEN * SEQ_LEN
    for window in torch.tensor(ids[:total]).view(-1, SEQ_LEN):
        model(window[None], use_cache=False)
    return {
        layer: ([n / total for n in tokens], [s / max(n, 1) for n, s in zip(tokens, sums, strict=True)])
        for layer, (tokens, sums) in found.items()
    }


KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "granitemoe", "jamba", "gpt_oss")


@pytest.mark.parametrize("kind", KINDS)
def test_use_is_that_of_a_loop_over_tokens_and_experts(kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, kind, **{**COMMON, **FAMILIES[kind]})
    use, expected = measured(tmp_path), naive(tmp_path)
    assert use.layers.keys() == expected.keys()
    for layer, (frequency, reap) in expected.items():
        assert list(use.layers[layer].frequency) == pytest.approx(frequency)
        assert list(use.layers[layer].reap) == pytest.approx(reap, rel=1e-4)
        assert sum(use.layers[layer].frequency) == pytest.approx(2)
        assert max(use.layers[layer].reap) > 0


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v2", "phimoe", "glm4_moe", "ernie4_5_moe", "minimax"])
def test_other_families_are_measured_too(kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, kind, **{**COMMON, **FAMILIES[kind]})
    for layer in measured(tmp_path).layers.values():
        assert sum(layer.frequency) == pytest.approx(2)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama4_text", "does not tell its experts .Llama4TextExperts. which tokens take them"),
        ("llama", "LlamaForCausalLM has no experts of a form that is known here"),
    ],
)
def test_what_is_not_measured_is_refused_by_name(kind: str, message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, kind, **{**COMMON, **FAMILIES[kind]})
    with pytest.raises(UsageError, match=message):
        measured(tmp_path)


def test_what_is_printed_is_no_other_for_being_watched(tmp_path: Path) -> None:
    save_mixture(tmp_path, "gpt_oss")
    plain, watched = (
        evaluate([open_checkpoint(tmp_path)], TEXT, seq_len=SEQ_LEN, influence=on, experts=on).scores[0]
        for on in (False, True)
    )
    assert plain.nll == watched.nll


def test_packed_experts_are_measured_as_dequantised_ones_are(tmp_path: Path) -> None:
    save_tiny(tmp_path / "full", "mixtral")
    weightops.quantize(tmp_path / "full", tmp_path / "quantized", method="rtn", group_size=32, mse=False)
    plain, packed = (measured(tmp_path / "quantized", engine=each) for each in ("dequantized", "packed"))
    for layer in plain.layers:
        assert packed.layers[layer].reap == pytest.approx(plain.layers[layer].reap, rel=1e-3)


def test_an_expert_that_no_token_comes_to_has_zeros(tmp_path: Path) -> None:
    save_mixture(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    tensors[gate].zero_()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    layer = measured(tmp_path).layers["0"]
    # Of equal logits the same two win for every token.
    assert sorted(layer.frequency) == [0, 0, 1, 1]
    assert [score == 0 for score in layer.reap] == [share == 0 for share in layer.frequency]


def dominated(folder: Path) -> None:
    """A Mixtral whose expert 2 gives next to nothing in layer 0, and expert 1 in layer 1."""
    save_mixture(folder, "mixtral")
    tensors = load_file(folder / "model.safetensors")
    for layer, expert in ((0, 2), (1, 1)):
        tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"] *= 1e-4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_an_expert_that_does_nothing_is_found_and_left_out(tmp_path: Path) -> None:
    dominated(tmp_path / "moe")
    (tmp_path / "text.txt").write_text(TEXT)
    use = tmp_path / "use.json"
    weightops.evaluate(tmp_path / "moe", tmp_path / "text.txt", seq_len=SEQ_LEN, experts=use)
    document = json.loads(use.read_text())
    assert document["schema"] == "weightops-experts/1"
    least = [min(range(4), key=layer["reap"].__getitem__) for layer in document["layers"].values()]
    assert least == [2, 1]
    weightops.experts(tmp_path / "moe", tmp_path / "out", keep=str(use), count=3)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "out"))
    for layer, kept in ((0, [0, 1, 3]), (1, [0, 2, 3])):
        gate = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        assert torch.equal(after[gate], before[gate][kept])
    manifest = json.loads((tmp_path / "out" / "weightops-manifest.json").read_text())
    assert '"0": [0, 1, 3]' in json.dumps(manifest)
    assert "use.json" not in json.dumps(manifest)


def test_one_file_is_about_one_model(tmp_path: Path) -> None:
    save_mixture(tmp_path / "moe", "mixtral")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(UsageError, match="a file about one model, and 2 are given"):
        weightops.evaluate([tmp_path / "moe"] * 2, tmp_path / "text.txt", experts=tmp_path / "use.json")
