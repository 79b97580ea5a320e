"""A model that is run block by block computes what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, GEMMA_3N, GEMMA_4, VOCAB, save_tiny, text, tiny
from transformers import AutoModelForCausalLM

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, SourceMissing, UsageError, WeightopsError
from weightops.formats.folder import open_checkpoint
from weightops.inference.arguments import beyond_hidden_states
from weightops.inference.evaluate import evaluate
from weightops.inference.model import BlockModel
from weightops.operations.recover import recover
from weightops.operations.shard.operation import shard

TOKENS = torch.randint(2, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(checkpoint: Checkpoint, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """As evaluate computes them: one part in memory at a time."""
    model = BlockModel(checkpoint)
    with model.loaded(""):
        hidden, given = model.embed(tokens)
    for i, name in enumerate(model.blocks):
        with model.loaded(name):
            hidden = model.run(i, hidden, given)
    assert all(p.device.type == "meta" for p in model.module.parameters())
    with model.loaded(""):
        return model.logits(hidden)


@torch.no_grad()
def reference_logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    expected = reference_logits(save_tiny(tmp_path, kind))
    assert expected.std() > 0.1
    assert torch.equal(logits(open_checkpoint(tmp_path)), expected)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_model_of_one_block_runs(tmp_path: Path, kind: str) -> None:
    depth = {"num_hidden_layers": 1} if kind == "llama" else {"n_layer": 1}
    expected = reference_logits(save_tiny(tmp_path, kind, **depth))
    assert torch.equal(logits(open_checkpoint(tmp_path)), expected)


def test_logits_alone_find_out_what_blocks_return(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "bloom", n_layer=1)
    hidden = torch.randn(1, 5, 64)
    found = BlockModel(open_checkpoint(tmp_path))
    with found.loaded(""), torch.no_grad():
        expected = model.lm_head(model.transformer.ln_f(hidden))
        assert torch.equal(found.logits(hidden), expected)


def test_every_container_and_a_lazily_recovered_model_give_the_same(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "full", "llama")
    expected = reference_logits(model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    torch.save(model.state_dict(), tmp_path / "full" / "pytorch_model.bin")
    (tmp_path / "full" / "model.safetensors").unlink()
    raw = tiny("llama", seed=1)
    raw.save_pretrained(tmp_path / "raw")
    (tmp_path / "diff").mkdir()
    state = {n: (t - raw.state_dict()[n]).contiguous() for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "diff" / "model.safetensors")
    (tmp_path / "diff" / "config.json").write_text((tmp_path / "full" / "config.json").read_text())
    for folder in ("full", "sharded"):
        assert torch.equal(logits(open_checkpoint(tmp_path / folder)), expected), folder
    recovered = recover(open_checkpoint(tmp_path / "raw"), open_checkpoint(tmp_path / "diff"))
    assert (logits(recovered) - expected).abs().max() < 1e-3


def test_weights_are_cast_on_their_way(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    expected = reference_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    model = BlockModel(open_checkpoint(tmp_path), dtype=torch.bfloat16)
    model.load("model.layers.1.self_attn.q_proj")
    weight = load_file(tmp_path / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(model.module.get_parameter("model.layers.1.self_attn.q_proj.weight"), weight.bfloat16())
    assert model.module.get_parameter("model.layers.1.self_attn.k_proj.weight").device.type == "meta"
    with model.loaded("", *model.blocks), torch.no_grad():
        assert torch.equal(model.module(TOKENS).logits, expected)


def test_names_without_the_models_own_and_a_tied_head(tmp_path: Path) -> None:
    """BLOOM's published files lack `transformer.`, and hold the embedding once."""
    expected = reference_logits(save_tiny(tmp_path, "bloom"))
    stripped = shard(open_checkpoint(tmp_path), drop_prefix="transformer.")
    model = BlockModel(stripped)
    assert model.blocks == ["transformer.h.0", "transformer.h.1"]
    names = model.tensor_names("transformer.h.1")
    assert names["transformer.h.1.self_attention.query_key_value.weight"] == "h.1.self_attention.query_key_value.weight"
    assert model.tensor_names("")["lm_head.weight"] == "word_embeddings.weight"
    assert torch.equal(logits(stripped), expected)


def test_a_head_that_is_stored_counts_even_if_the_config_says_tied(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert torch.equal(logits(open_checkpoint(tmp_path)), reference_logits(model))


def test_what_old_checkpoints_hold_beside_weights_is_left_alone(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, tmp_path / "model.safetensors")
    assert torch.equal(logits(open_checkpoint(tmp_path)), reference_logits(model))


def test_blocks_that_are_given_more_of_the_tokens_are_refused(tmp_path: Path) -> None:
    """Gemma 3n's get an embedding of their own: what was caught for one window is wrong for the next."""
    save_tiny(tmp_path, "gemma3n_text", **GEMMA_3N)
    model = BlockModel(open_checkpoint(tmp_path))
    model.load("")
    model.embed(TOKENS)
    with pytest.raises(UsageError, match="gives its blocks more of the tokens"):
        model.embed(TOKENS.flip(1))


JOINED = {"gemma3n_text": GEMMA_3N, "gemma4_text": GEMMA_4}


@pytest.mark.parametrize("kind", JOINED)
def test_models_whose_blocks_are_not_run_apart_are_refused_before_weights_are_read(tmp_path: Path, kind: str) -> None:
    words = "gives its blocks per_layer_input"
    save_tiny(tmp_path, kind, **JOINED[kind])
    checkpoint = open_checkpoint(tmp_path)
    model = BlockModel(checkpoint)
    with pytest.raises(UsageError, match=f"{words}, so it is not run block by block"):
        model.refuse_joined_blocks()
    assert all(parameter.device.type == "meta" for parameter in model.module.parameters())
    (tmp_path / "model.safetensors").unlink()  # nobody looks for it any more
    with pytest.raises(UsageError, match=words):
        evaluate([checkpoint], text(), seq_len=32)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mask": None, "places": (torch.ones(2), torch.ones(2)), "masks": {"a": torch.ones(1)}, "cache": False}, None),
        ({"mask": None, "own": torch.ones(2, requires_grad=True)}, "own"),
        ({"both": [None, (torch.ones(2, requires_grad=True),)]}, "both"),
        ({"shared": {}}, "shared"),
        ({"by_kind": {"full": torch.ones(2, requires_grad=True)}}, "by_kind"),
        ({"tokens": TOKENS}, "tokens"),
    ],
)
def test_what_blocks_are_given_beyond_hidden_states_and_places(given: dict[str, object], expected: str | None) -> None:
    assert beyond_hidden_states([{}, given], TOKENS) == expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_others_are_not(tmp_path: Path, kind: str) -> None:
    save_tiny(tmp_path, kind)
    BlockModel(open_checkpoint(tmp_path)).refuse_joined_blocks()


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        ({"drop": "model.norm.weight"}, IncompatibleInputs, "lacks model.norm.weight"),
        ({"add": "model.layers.0.self_attn.q_proj.bias"}, IncompatibleInputs, "q_proj.bias, which LlamaForCausalLM"),
        (
            {"config": {"vocab_size": VOCAB + 1}},
            IncompatibleInputs,
            "model.embed_tokens.weight has the shape [320, 64]",
        ),
        ({"config": {"auto_map": {"AutoModelForCausalLM": "x.Y"}}}, UsageError, "never run"),
        ({"config": {"model_type": "llamma"}}, UsageError, "no model_type 'llamma'"),
        (
            {"config": {"quantization_config": {"quant_method": "awq"}}},
            IncompatibleInputs,
            "quant_method awq, and every weight is plain",
        ),
        ({"config": {"num_attention_heads": "four"}}, IncompatibleInputs, "does not take its config.json"),
        ({"config": None}, SourceMissing, "no config.json"),
    ],
)
def test_refusals(tmp_path: Path, edit: dict[str, object], error: type[WeightopsError], words: str) -> None:
    save_tiny(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    match edit:
        case {"drop": str(name)}:
            del state[name]
        case {"add": str(name)}:
            state[name] = torch.ones(64)
        case {"config": None}:
            (tmp_path / "config.json").unlink()
        case {"config": dict(changes)}:
            (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(error) as caught:
        BlockModel(open_checkpoint(tmp_path))
    assert words in str(caught.value)
