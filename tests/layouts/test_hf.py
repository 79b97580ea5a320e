"""transformers' layout: config.json in two dialects, read and written; tied heads; biases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meta_model import whole_tensors
from safetensors.torch import load_file, save_file
from small_tokenizers import sentencepiece_model
from support import given_tensor, same_bits
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError
from weightops.layouts import hf
from weightops.layouts.model import Hyperparameters, Model, RopeScaling
from weightops.layouts.names import roles, shape_of
from weightops.layouts.source import Source

H = Hyperparameters(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    vocab_size=40,
    norm_eps=1e-5,
    rope_theta=5e5,
    context_length=64,
)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=32)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 64,
}


def read(config: dict[str, Any], h: Hyperparameters = H, **tensors: Any) -> Model:
    """What is read from a config, `...` leaving out a field, and zeros of `h`'s shapes; `None` takes a tensor away."""
    made = {role.name("hf", n): given_tensor(torch.zeros(shape_of(role, h))) for role, n in roles(h.n_layers)}
    made |= {name.replace("__", "."): value for name, value in tensors.items()}
    present = {name: tensor for name, tensor in made.items() if tensor is not None}
    content = json.dumps({key: value for key, value in config.items() if value is not ...}).encode()
    files = {"config.json": content}
    return hf.read(Source(Checkpoint("model", present), files.get, lambda tensor: bytes(tensor.nbytes)))


ROPE: dict[str, tuple[dict[str, Any], tuple[float, RopeScaling | None]]] = {
    "neither": ({"rope_theta": ...}, (1e4, None)),
    "4": ({"rope_scaling": None}, (5e5, None)),
    "4 with type": ({"rope_scaling": {"type": "llama3", **LLAMA3}}, (5e5, SCALING)),
    "4 with rope_type": ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, (5e5, SCALING)),
    "4 with both": ({"rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}}, (5e5, SCALING)),
    "5": ({"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, (7.0, None)),
    "5 scaled": (
        {"rope_theta": ..., "rope_parameters": {"rope_type": "llama3", "rope_theta": 7, **LLAMA3}},
        (7.0, SCALING),
    ),
    "both": (
        {"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_parameters": {"type": "llama3", **LLAMA3}},
        (5e5, SCALING),
    ),
    "explicitly whole": ({"partial_rotary_factor": 1.0}, (5e5, None)),
}


@pytest.mark.parametrize("dialect", ROPE)
def test_rotary_frequencies_are_read_as_transformers_does(tmp_path: Path, dialect: str) -> None:
    changes, expected = ROPE[dialect]
    found = read({**CONFIG, **changes}).hyperparameters
    assert (found.rope_theta, found.rope_scaling) == expected
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert theirs["rope_theta"] == expected[0]
    assert theirs["rope_type"] == ("llama3" if expected[1] else "default")


def scaled(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, "factor": 2.0, **more}}


WHOLE = {"rope_type": "llama3", **LLAMA3}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised model_type llama is not converted"),
    "mixture": ({"num_local_experts": 8}, "model_type llama is not converted"),
    "other type": ({"model_type": "qwen2"}, "model_type qwen2 is not"),
    "type a list": ({"model_type": ["llama"]}, r"model_type \['llama'\] is not"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act gelu"),
    "linear": (scaled("linear"), "rope_scaling: rotary scaling of type linear"),
    "dynamic": (scaled("dynamic"), "type dynamic"),
    "yarn": (scaled("yarn"), "type yarn"),
    "linear in 5": (
        {"rope_parameters": scaled("linear")["rope_scaling"]},
        "rope_parameters: rotary scaling of type linear",
    ),
    "linear, hidden by a default": (
        {**scaled("linear"), "rope_parameters": {"rope_type": "default"}},
        "rotary scaling of type linear",
    ),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not converted"),
    "part of a head in 5": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not"),
    "two thetas": ({"rope_parameters": {"rope_theta": 1e4}}, "contradict one another"),
    "two scalings": ({"rope_scaling": WHOLE, "rope_parameters": {"rope_type": "default"}}, "contradict one another"),
    "two factors": ({"rope_scaling": WHOLE, "rope_parameters": {**WHOLE, "factor": 4.0}}, "contradict one another"),
    "scaling as text": ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', expected an object"),
    "parameters as list": ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
    "no factor": ({"rope_scaling": {**WHOLE, "factor": None}}, "config.json: rope_scaling: factor is None"),
    "theta as text": ({"rope_theta": "1e4"}, "rope_theta is '1e4', expected a number above zero"),
    "heads as text": ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
    "half a layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5, expected a whole number"),
    "tied as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    "no width": ({"hidden_size": ...}, "hidden_size is None"),
    "no layers": ({"num_hidden_layers": ...}, "num_hidden_layers is None"),
    "another vocabulary": ({"vocab_size": 41}, r"vocab_size is 41, model.embed_tokens.weight has 40 rows"),
    "another width": ({"hidden_size": 64}, r"embed_tokens.weight is \[40, 32\], the parameters say \[40, 64\]"),
    "other heads": ({"head_dim": 16}, r"q_proj.weight is \[32, 32\], the parameters say \[64, 32\]"),
    "heads of k": ({"num_key_value_heads": 4}, r"k_proj.weight is \[16, 32\], the parameters say \[32, 32\]"),
    "fewer layers": ({"num_hidden_layers": 1}, "is no tensor of a LLaMA model, and so are 8 more"),
    "more layers": ({"num_hidden_layers": 10**9}, "model.layers.2.self_attn.q_proj.weight is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_are_refused_by_field(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises((UsageError, CorruptInput), match=words) as raised:
        read({**CONFIG, **changes})
    assert str(raised.value).startswith("model")


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    """Of those fields that are not in the weights."""
    left_out = {"max_position_embeddings": ..., "rms_norm_eps": ..., "rope_theta": ..., "tie_word_embeddings": ...}
    for family in ("llama", "mistral"):
        found = read({**CONFIG, **left_out, "model_type": family}).hyperparameters
        theirs = AutoConfig.for_model(family)
        assert found.context_length == theirs.max_position_embeddings
        assert found.sliding_window == (theirs.sliding_window if family == "mistral" else None)
        assert (found.norm_eps, found.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
        assert found.tied == theirs.tie_word_embeddings


def test_heads_may_have_a_size_of_their_own() -> None:
    h = replace(H, head_dim=16)
    assert read({**CONFIG, "head_dim": 16}, h).hyperparameters == h


def test_tied_heads() -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    assert "output.weight" not in read(tied, lm_head__weight=None).tensors
    assert read(tied, lm_head__weight=None).dropped == {}
    assert "tied to the embedding" in read(tied).dropped["lm_head.weight"]
    with pytest.raises(CorruptInput, match=r"lm_head\.weight is missing"):  # and nothing says that it is tied
        read(CONFIG, lm_head__weight=None)
    with pytest.raises(CorruptInput, match=r"ties lm_head\.weight to .* they do not agree: float32 \[40, 32\] and"):
        read(tied, lm_head__weight=given_tensor(torch.zeros(41, 32)))


def test_a_tied_head_with_other_values_is_found_when_it_is_written(tmp_path: Path) -> None:
    model = random_model(tmp_path / "hf", tie_word_embeddings=True)
    head = model.state_dict()["lm_head.weight"].clone()
    tensors = {**model.state_dict(), "lm_head.weight": head}
    save_file(tensors, tmp_path / "hf/model.safetensors")
    api.convert(tmp_path / "hf", tmp_path / "same", to="meta")
    head[39, 31] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(CorruptInput, match="they do not agree: the values differ"):
        api.convert(tmp_path / "hf", tmp_path / "other", to="meta")
    assert not (tmp_path / "other").exists()


def random_model(folder: Path, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {key: value for key, value in CONFIG.items() if key not in ("model_type", "rope_theta")}
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.ndim == 1))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_biases(tmp_path: Path) -> None:
    """Into GGUF, whose rows of q and k and whose biases of these are in the other order; no other layout has them."""
    folder = tmp_path / "hf"
    model = random_model(folder, attention_bias=True, mlp_bias=True, vocab_size=1500)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    api.convert(folder, tmp_path / "gguf", to="gguf")
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    state = model.state_dict()
    for name, heads in (("q", 4), ("k", 2)):
        bias = state[f"model.layers.1.self_attn.{name}_proj.bias"]
        pairs = bias.view(heads, 2, 4).transpose(1, 2).reshape(-1)
        np.testing.assert_array_equal(found[f"blk.1.attn_{name}.bias"], pairs)
    np.testing.assert_array_equal(found["blk.0.ffn_down.bias"], state["model.layers.0.mlp.down_proj.bias"])
    assert sum(name.endswith(".bias") for name in found) == 14
    for layout, words in (("meta", "no place in Meta's"), ("tencentpretrain", "no place in TencentPretrain's")):
        with pytest.raises(UsageError, match=rf"_proj\.bias|\.bias has {words}"):
            api.convert(folder, tmp_path / "out", to=layout)


def test_biases_that_transformers_would_not_read_are_refused() -> None:
    whole = whole_tensors(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab=40, dtype=torch.float32, rope_freqs=False
    )
    tensors = {name: given_tensor(tensor) for name, tensor in whole}
    bias = {f"layers.{n}.attention.{w}.bias": given_tensor(torch.ones(r)) for n in (0, 1) for w, r in ROWS.items()}
    model = Model(name="m", hyperparameters=H, tensors=tensors | bias)
    config = hf.write(model).config()
    assert (config["attention_bias"], config["mlp_bias"]) == (True, False)
    del bias["layers.1.attention.wo.bias"]
    with pytest.raises(UsageError, match=r"there is no model\.layers\.1\.self_attn\.o_proj\.bias"):
        hf.write(replace(model, tensors=tensors | bias))
    with pytest.raises(UsageError, match="no place for the biases of a Mistral"):
        hf.write(replace(model, hyperparameters=replace(H, family="mistral")))
    with pytest.raises(UsageError, match=r"model\.norm\.bias is no tensor of a LLaMA model"):
        read(CONFIG, model__norm__bias=given_tensor(torch.ones(32)))


ROWS = {"wq": 32, "wk": 16, "wv": 16, "wo": 32}


def test_integers_are_no_weights() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UsageError, match=rf"{name} is int8 \[48, 32\], weights are floating-point"):
        read(CONFIG, **{name: given_tensor(torch.ones(48, 32, dtype=torch.int8))})


@st.composite
def parameters(draw: st.DrawFn) -> Hyperparameters:
    kv, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 4)))
    positive = st.floats(1e-12, 1e12)
    family = draw(st.sampled_from(("llama", "mistral")))
    scaling = RopeScaling(
        factor=draw(positive),
        low_freq_factor=draw(positive),
        high_freq_factor=draw(positive),
        original_context_length=draw(st.integers(1, 1 << 20)),
    )
    return Hyperparameters(
        family="mistral" if family == "mistral" else "llama",
        dim=draw(st.integers(1, 9)),
        n_layers=draw(st.integers(1, 2)),
        n_heads=kv * group,
        n_kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 3)),
        ffn_dim=draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(1, 9)),
        norm_eps=draw(positive),
        rope_theta=draw(positive),
        rope_scaling=draw(st.sampled_from((None, scaling))),
        context_length=draw(st.integers(1, 1 << 30)),
        sliding_window=draw(st.sampled_from((None, 17))) if family == "mistral" else None,
        tied=draw(st.booleans()),
    )


@given(h=parameters(), dialect=st.sampled_from(("4", "5", "both")))
def test_every_field_comes_back_from_either_dialect(h: Hyperparameters, dialect: str) -> None:
    config = hf.config_of(h, {}, "float32", (False, False))
    for key in {"4": ["rope_parameters"], "5": ["rope_theta", "rope_scaling"], "both": []}[dialect]:
        del config[key]
    assert read(config, h).hyperparameters == h


@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_reads_the_same_values(tmp_path: Path, family: Any, scaling: RopeScaling | None) -> None:
    h = replace(H, family=family, rope_scaling=scaling, head_dim=16, sliding_window=8 if family == "mistral" else None)
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    written = hf.config_of(h, ids, "bfloat16", (family == "llama", False))
    (tmp_path / "config.json").write_text(json.dumps(written))
    found = AutoConfig.from_pretrained(tmp_path)
    same = {key for key in written if key not in ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype")}
    assert {key: getattr(found, key) for key in same} == {key: written[key] for key in same}
    assert found.dtype is torch.bfloat16
    kind = {"rope_type": "llama3", **LLAMA3} if scaling else {"rope_type": "default"}
    assert found.rope_parameters == {**kind, "rope_theta": 5e5}


@torch.no_grad()
def test_a_rewritten_config_computes_the_same(tmp_path: Path) -> None:
    """A model of transformers 5 with Llama 3.1's scaling, by way of Meta's files."""
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3, "original_max_position_embeddings": 8192}
    model = random_model(tmp_path / "hf", rope_parameters=scaling)
    api.convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    settings = {"context_length": "64"}
    api.convert(tmp_path / "meta", tmp_path / "again", to="hf", set=settings)
    assert same_bits(load_file(tmp_path / "again/model.safetensors"), model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(40)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
