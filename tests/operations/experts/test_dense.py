"""Mixtures made of dense models, by mergekit-moe's rules where they are right and better where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import COMMON
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import weightops
from weightops.errors import IncompatibleInputs, UsageError

IDS = torch.tensor([[3, 5, 9, 17, 33]])
PROMPTS = {
    "one": {"positive_prompts": ["Hello there.", "a"]},
    "two": {"positive_prompts": ["def f(x):"], "negative_prompts": ["Hello there."]},
}


def document(*names: str, **more: Any) -> dict[str, Any]:
    experts = [{"source_model": name, **PROMPTS.get(name, {})} for name in names]
    return {"base_model": names[0], "gate_mode": "cheap_embed", "experts": experts, **more}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models in the working directory, of which the first has generation settings and a pad token of its own."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        save_tiny(tmp_path / name, "llama", seed)
    tokens = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    (tmp_path / "one" / "tokenizer_config.json").write_text(json.dumps({**tokens, "pad_token": "</s>"}))
    return tmp_path


def logits(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits.float()  # type: ignore[no-any-return]


def gate(prompts: list[str], folder: Path) -> torch.Tensor:
    """mergekit's: embeddings of the tokens of all prompts, each with the bos token's text before it, made unit long."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    total = torch.zeros(rows.shape[1])
    for prompt in prompts:
        for number in tokenizer(tokenizer.bos_token + prompt, add_special_tokens=False).input_ids:
            total += rows[number]
    return total / total.norm()


def test_gates_are_mergekits_and_experts_their_models(here: Path) -> None:
    weightops.experts(None, here / "out", from_dense=document("one", "two", dtype="float32"))
    made = load_file(here / "out" / "model.safetensors")
    positive = [gate(PROMPTS[name]["positive_prompts"], here / "one") for name in ("one", "two")]
    second = positive[1] - gate(PROMPTS["two"]["negative_prompts"], here / "one")
    wanted = torch.stack([positive[0], second / second.norm()])
    for layer in range(3):
        torch.testing.assert_close(
            made[f"model.layers.{layer}.block_sparse_moe.gate.weight"], wanted, rtol=0, atol=1e-6
        )
        for number, name in enumerate(("one", "two")):
            own = load_file(here / name / "model.safetensors")
            for part, old in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                new = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{part}.weight"
                assert torch.equal(made[new], own[f"model.layers.{layer}.mlp.{old}.weight"])
    base = load_file(here / "one" / "model.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in base.items() if ".mlp." not in name)
    logits(here / "out")


def test_tokenizer_and_generation_settings_stay_which_mergekit_loses(here: Path) -> None:
    weightops.experts(None, here / "out", from_dense=document("one", "two"))
    ours, theirs = AutoTokenizer.from_pretrained(here / "out"), AutoTokenizer.from_pretrained(here / "one")
    theirs.pad_token_id = theirs.bos_token_id  # what mergekit does before it saves the tokenizer
    assert ours.pad_token == "</s>" != theirs.pad_token
    assert (here / "out" / "generation_config.json").read_bytes() == (
        here / "one" / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_copies_of_one_model_answer_as_it_does(kind: str, here: Path) -> None:
    tiny(kind, **{**COMMON, "sliding_window": None}).save_pretrained(here / "dense")
    copies = {"base_model": "dense", "gate_mode": "random", "experts": [{"source_model": "dense"}] * 4}
    weightops.experts(None, here / "out", from_dense=copies, seed=7)
    torch.testing.assert_close(logits(here / "out"), logits(here / "dense"), rtol=1e-5, atol=1e-5)


def test_random_routers_are_the_same_by_seed_and_others_by_layer(here: Path) -> None:
    routers = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        weightops.experts(None, here / name, from_dense=document("one", "two", gate_mode="uniform_random"), seed=seed)
        made = load_file(here / name / "model.safetensors")
        routers.append([made[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)])
    assert all(torch.equal(x, y) for x, y in zip(routers[0], routers[1], strict=True))
    assert not torch.equal(routers[0][0], routers[2][0])
    assert not torch.equal(routers[0][0], routers[0][1])
    assert float(routers[0][0].abs().max()) <= 64**-0.5


def test_a_file_and_a_recipe_give_the_same(here: Path) -> None:
    (here / "moe.yml").write_text(yaml.safe_dump(document("one", "two", experts_per_token=1)))
    weightops.experts(None, here / "file", from_dense=here / "moe.yml")
    weightops.run(
        {
            "sources": {"one": "one", "two": "two"},
            "tensors": {
                "moe": {
                    "experts": {"source": ["one", "two"], "from_dense": document("one", "two", experts_per_token=1)}
                }
            },
            "outputs": {"recipe": {"from": "moe"}},
        }
    )
    assert (here / "file/model.safetensors").read_bytes() == (here / "recipe/model.safetensors").read_bytes()
    assert json.loads((here / "file/config.json").read_text())["num_experts_per_tok"] == 1


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gate_mode": "hidden"}, "gate_mode hidden needs the base model to be run"),
            ({"gate_mode": "cheap"}, "gate_mode cheap is not known"),
            ({"gate_mod": "random"}, "gate_mod: unknown field"),
            ({"experts": [{"source_model": "one"}]}, "experts_per_token is 2, and there are 1 experts"),
            ({"experts": [{"source_model": "one"}, {"source_model": "two"}]}, "expert 0 has no positive_prompts"),
            (
                {"experts": [{"source_model": n, "positive_prompts": ["x"]} for n in ("one", "two")]},
                "all experts have the same prompts",
            ),
            ({"shared_experts": [{"source_model": "one"}]}, "shared_experts"),
            ({"experts": [{"source_model": "one", "noise_scale": 0.1}] * 2}, "noise_scale"),
            ({"experts": "one"}, "experts"),
            ({"experts_per_token": "two"}, "experts_per_token"),
        ],
    )
    def test_what_is_not_done_or_cannot_be_meant(self, change: dict[str, Any], message: str, here: Path) -> None:
        with pytest.raises(UsageError, match=message):
            weightops.experts(None, here / "out", from_dense={**document("one", "two"), **change})
        assert not (here / "out").exists()

    def test_biases_that_a_mixtral_has_no_place_for(self, here: Path) -> None:
        """mergekit leaves them out in silence."""
        for name in ("one", "two"):
            save_tiny(here / name, "llama", attention_bias=True)
        with pytest.raises(IncompatibleInputs, match=r"has biases .*q_proj\.bias"):
            weightops.experts(None, here / "out", from_dense=document("one", "two"))

    def test_models_of_several_kinds(self, here: Path) -> None:
        save_tiny(here / "two", "qwen2")
        with pytest.raises(IncompatibleInputs, match="models of several kinds"):
            weightops.experts(None, here / "out", from_dense=document("one", "two"))

    def test_an_expert_of_other_sizes(self, here: Path) -> None:
        save_tiny(here / "two", "llama", intermediate_size=80)
        with pytest.raises(IncompatibleInputs, match=r"mlp\.\w+_proj\.weight is \[\d+, \d+\], expected"):
            weightops.experts(None, here / "out", from_dense=document("one", "two"))

    def test_a_tokenizer_with_more_tokens_than_rows(self, here: Path) -> None:
        tensors = load_file(here / "one" / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:40].clone()
        save_file(tensors, here / "one" / "model.safetensors", {"format": "pt"})
        with pytest.raises(IncompatibleInputs, match="which has no row"):
            weightops.experts(None, here / "out", from_dense=document("one", "two"))

    def test_a_base_without_a_tokenizer(self, here: Path) -> None:
        (here / "one" / "tokenizer.json").unlink()
        with pytest.raises(IncompatibleInputs, match=r"has no tokenizer\.json"):
            weightops.experts(None, here / "out", from_dense=document("one", "two"))

    def test_a_seed_without_chance(self, here: Path) -> None:
        with pytest.raises(UsageError, match="nothing is random"):
            weightops.experts(None, here / "out", from_dense=document("one", "two"), seed=1)
