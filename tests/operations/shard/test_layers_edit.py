"""Layers kept, left out and repeated, held against transformers' own models and configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import evaluate, given_tensor, write_checkpoint
from tiny_models import GEMMA_3N, GEMMA_4

import weightops
from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError, WeightopsError
from weightops.layouts.layer_config import _OWN_PERIODS, edit_config
from weightops.operations.shard.layers import keep_layers, parse_layers

Config = dict[str, Any]


def shared(count: int, kinds: str) -> Config:
    return {"num_kv_shared_layers": count, "layer_types": list(kinds)}


def model(names: list[str], config: Mapping[str, Any] | None) -> Checkpoint:
    """A checkpoint of tensors that are all different."""
    tensors = {name: given_tensor(torch.tensor([float(i)])) for i, name in enumerate(names)}
    sidecars = {} if config is None else {"config.json": written_json(config)}
    return Checkpoint("model", tensors, sidecars, shards=dict.fromkeys(names, "model.safetensors"))


def llama_names(count: int, prefix: str = "model.layers") -> list[str]:
    layers = [f"{prefix}.{n}.{kind}.weight" for n in range(count) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    return ["model.embed_tokens.weight", *layers, "model.norm.weight"]


def edited(config: Config, order: list[int], n_mtp: int = 0) -> tuple[Config, list[str]]:
    return edit_config(config, order, n_mtp, "config.json")


# --- what is asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-2", [0, 1, 2]), ("5", [5]), (" 0 - 1 , 4-5", [0, 1, 4, 5]), ("0-1,1-2,1", [0, 1, 1, 2, 1]), ("3,2", [3, 2])],
)
def test_layers_are_ranges_and_numbers_in_order(text: str, expected: list[int]) -> None:
    assert parse_layers(text, 6) == (expected, frozenset())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "cannot read the layers ''"),
        ("0-2,", "cannot read the layers ''"),
        ("all", "cannot read the layers 'all'"),
        ("-1", "cannot read the layers '-1'"),
        ("٣", "cannot read the layers"),
        ("3-1", "the layers 3-1 go backwards"),
        ("0-6", "there is no layer 6: the model has 6, 0 to 5"),
        ("0-999999999", "there is no layer 999999999"),
        (",".join(["0-5"] * 20_000), "more than 100000 layers"),
        (",".join(["0-5"] * 101), "layer 0 is named 101 times, at most 100 are written"),
    ],
)
def test_layers_that_cannot_be_meant_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_layers(text, 6)


# --- tensors ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 12), data=st.data())
def test_each_layer_has_the_tensors_of_the_one_it_was_and_the_rest_is_as_it_was(
    count: int, data: st.DataObject
) -> None:
    order = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
    names = llama_names(count)
    shuffled = data.draw(st.permutations(names))
    source = model(shuffled, {"num_hidden_layers": count, "model_type": "llama"})
    result = keep_layers(source, ",".join(map(str, order)))
    expected = {name: source[name] for name in names if ".layers." not in name}
    for new, old in enumerate(order):
        for kind in ("self_attn.q_proj", "mlp.up_proj"):
            expected[f"model.layers.{new}.{kind}.weight"] = source[f"model.layers.{old}.{kind}.weight"]
    assert {name: evaluate(tensor) for name, tensor in result.items()} == {
        name: evaluate(tensor) for name, tensor in expected.items()
    }
    assert len(set(result.values())) == len(result)
    assert result.shards.keys() == expected.keys()
    assert result.config()["num_hidden_layers"] == len(order)


def test_layers_come_in_their_new_order_where_the_first_was() -> None:
    source = model(["a.weight", "h.0.x", "h.1.x", "h.1.y", "h.2.x", "b.weight"], {"n_layer": 3, "model_type": "gpt2"})
    assert list(keep_layers(source, "2,1,1")) == ["a.weight", "h.0.x", "h.1.x", "h.1.y", "h.2.x", "h.2.y", "b.weight"]


def test_experts_and_towers_are_not_taken_for_layers() -> None:
    experts = [f"model.layers.{n}.mlp.experts.{e}.w1.weight" for n in range(2) for e in range(2)]
    tower = [f"vision_tower.encoder.layers.{n}.fc.weight" for n in range(2)]
    source = model([*tower, *experts], {"text_config": {"num_hidden_layers": 2, "model_type": "llama"}})
    assert list(keep_layers(source, "1")) == [*tower, *(f"model.layers.0.mlp.experts.{e}.w1.weight" for e in range(2))]


def test_layers_for_further_tokens_follow_the_last() -> None:
    config = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1}
    result = keep_layers(model(llama_names(4), config), "0,2")
    source = model(llama_names(4), config)
    assert result["model.layers.2.mlp.up_proj.weight"] == source["model.layers.3.mlp.up_proj.weight"]
    assert (len(result), result.config()["num_hidden_layers"]) == (8, 2)


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_copies_of_a_layer_are_tensors_of_their_own(tmp_path: Path, container: str) -> None:
    tensors = {name: torch.randn(8, 8) for name in llama_names(2)}
    write_checkpoint(tmp_path / "raw", tensors, {"num_hidden_layers": 2})
    weightops.shard(tmp_path / "raw", tmp_path / "out", layers="0,1,1,1", format=container)
    (file,) = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".safetensors")]
    loaded = torch.load(file) if container == "torch" else load_file(file)
    assert loaded.keys() == set(llama_names(4))
    for new, old in enumerate([0, 1, 1, 1]):
        for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            assert torch.equal(loaded[f"model.layers.{new}.{name}"], tensors[f"model.layers.{old}.{name}"])
    assert len({t.data_ptr() for t in loaded.values()}) == len(loaded)


@pytest.mark.parametrize(
    ("names", "config", "error", "problem"),
    [
        (["a.weight"], {"num_hidden_layers": 1}, UsageError, "no tensors are named <prefix>.<number>.<rest>"),
        (["h.0.x", "h.2.x"], {"n_layer": 2}, UsageError, "no tensors are named .* without a gap"),
        (llama_names(2), {"num_hidden_layers": 3}, IncompatibleInputs, r"says 3 layers, the tensors have .* \(2\)"),
        (llama_names(2), {"model_type": "llama"}, UsageError, "does not say how many layers there are: it has none of"),
        (llama_names(2), {"num_hidden_layers": 2, "n_layer": 3}, UsageError, "it says 2, 3"),
        (llama_names(2), {"num_hidden_layers": "2"}, UsageError, "it says 2"),
        (["e.block.0.x", "d.block.0.x"], {"num_layers": 1}, UsageError, "cannot tell which layers are meant: d.block"),
        (["d.layers.0.x"], {"is_encoder_decoder": True}, UsageError, "layers of encoder-decoders are not edited"),
        (["e.block.0.x", "d.block.0.x"], None, UsageError, "cannot tell which layers are meant"),
    ],
)
def test_models_whose_layers_cannot_be_told_are_refused(
    names: list[str], config: Config | None, error: type[WeightopsError], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        keep_layers(model(names, config), "0")


def test_parameters_of_metas_layout_are_not_left_behind_in_silence() -> None:
    source = model(["layers.0.x"], None)
    meta = Checkpoint("meta", source.tensors, {"params.json": written_json({"n_layers": 1})})
    with pytest.raises(UsageError, match=r"has params\.json, which is not edited"):
        keep_layers(meta, "0")


def test_weights_without_a_config_are_edited_with_a_warning() -> None:
    result = keep_layers(model(llama_names(3), None), "0,2")
    assert list(result) == llama_names(2)
    assert result.warnings == ("there is no config.json to say that the model has 2 layers",)


# --- config.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "order", "expected"),
    [
        ({"layer_types": ["a", "b", "c", "d"]}, [0, 3, 3], {"layer_types": ["a", "d", "d"]}),
        ({"num_hidden_layers": None, "layers_block_type": list("abcd")}, [3, 0], {"layers_block_type": ["d", "a"]}),
        ({"hybrid_override_pattern": "M*E-"}, [3, 0], {"hybrid_override_pattern": "-M"}),
        ({"mlp_only_layers": [0, 2]}, [2, 1, 2], {"mlp_only_layers": [0, 2]}),
        ({"cross_attention_layers": [1]}, [0, 2, 3], {"cross_attention_layers": []}),
        ({"per_layer_config": {"2": {"x": 1}}}, [1, 2], {"per_layer_config": {"1": {"x": 1}}}),
        ({"first_k_dense_replace": 2}, [0, 2, 3], {"first_k_dense_replace": 1}),
        ({"first_k_dense_replace": 1}, [0, 0, 1, 2], {"first_k_dense_replace": 2}),
        ({"max_window_layers": 4, "use_sliding_window": True}, [0, 1, 1, 2, 3], {"max_window_layers": 5}),
        ({"max_window_layers": 28}, [0, 1], {"max_window_layers": 28}),
        ({"max_window_layers": 2, "use_sliding_window": False}, [3, 0], {"max_window_layers": 1}),
        ({"sliding_window_pattern": 2}, [0, 3, 2, 1], {"sliding_window_pattern": 2}),
        ({"sliding_window_pattern": 2, "layer_types": list("abab")}, [1, 2], {"layer_types": ["b", "a"]}),
        ({"no_rope_layers": [], "no_rope_layer_interval": 2}, [0, 1], {"no_rope_layers": []}),
        ({"moe_layer_freq": [0, 1, 1, 1]}, [1, 0], {"moe_layer_freq": [1, 0]}),
        ({"attention_types": [[["g", "l"], 2]]}, [0, 3, 2], {"attention_types": [[["g", "l", "g"], 1]]}),
        ({"n_layer": 4}, [1], {"n_layer": 1}),
        ({"moe_layer_end_index": 2}, [1, 2, 3], {"moe_layer_end_index": 1}),
        ({"moe_layer_end_index": -1}, [1, 2], {"moe_layer_end_index": -1}),
        ({"num_kv_shared_layers": 0}, [1, 2], {"num_kv_shared_layers": 0}),
        (
            shared(2, "abab"),
            [0, 1, 3],
            shared(1, "abb"),
        ),
        (shared(2, "abab"), [0, 1], shared(0, "ab")),
        (
            shared(1, "abab"),
            [1, 3, 3],
            shared(2, "bbb"),
        ),
        ({"eos_token_id": [1, 2, 3, 4]}, [1], {"eos_token_id": [1, 2, 3, 4]}),
    ],
)
def test_settings_of_layers_follow_them(settings_: Config, order: list[int], expected: Config) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4, **settings_}
    result, notes = edited(config, order)
    counted = {"num_hidden_layers": len(order)} if config["num_hidden_layers"] else {}
    assert result == {**config, **counted, **expected}
    assert notes == []


@pytest.mark.parametrize(
    ("settings_", "error", "problem"),
    [
        ({"first_k_dense_replace": 1}, UsageError, "first_k_dense_replace: the first 1 layers are of another kind"),
        ({"max_window_layers": 1, "use_sliding_window": True}, UsageError, "max_window_layers: the first 1 layers"),
        ({"sliding_window_pattern": 2}, UsageError, "period of 2, and layer 1 would be 0"),
        ({"sliding_window_pattern": "LLLG"}, UsageError, "sliding_window_pattern: layers differ with a period of 4"),
        ({"model_type": "gemma2"}, UsageError, "layers differ with a period of 2"),
        (
            shared(2, "abab"),
            UsageError,
            "layers from 2 on share keys and values",
        ),
        ({"moe_layer_end_index": 1}, UsageError, "layers after 1 are of another kind"),
        ({"model_type": "diffllama"}, UsageError, "layers of a diffllama compute with their own numbers"),
        ({"num_kv_shared_layers": 2}, UsageError, "which layers share is not known without layer_types"),
        ({"scale_attn_by_inverse_layer_idx": True}, UsageError, "ties layers to their numbers"),
        ({"layer_types": ["a"]}, IncompatibleInputs, "layer_types has 1 entries for 4 layers"),
        ({"mlp_only_layers": [-1]}, IncompatibleInputs, "mlp_only_layers has -1, which is no number of 4 layers"),
        ({"attention_types": [["g", None]]}, IncompatibleInputs, "attention_types is no list of patterns"),
        ({"attention_types": [[["g"], 10**12]]}, IncompatibleInputs, "attention_types has 100000 entries"),
    ],
)
def test_orders_that_a_config_cannot_describe_are_refused(
    settings_: Config, error: type[WeightopsError], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        edited({"model_type": "llama", "num_hidden_layers": 4, **settings_}, [1, 2, 0])


def test_a_layer_that_gives_its_keys_and_values_stays_the_one_that_does() -> None:
    config = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": list("ababab")}
    with pytest.raises(UsageError, match="layer 2 gives its keys and values to the 'a' layers from 4 on, and would be"):
        edited(config, [0, 1, 3, 4])
    with pytest.raises(
        UsageError, match=r"layer 3 gives its keys .* to the 'b' layers from 4 on, and would not be the"
    ):
        edited(config, [0, 3, 1, 5])
    assert edited(config, [0, 1, 3, 5])[0]["num_kv_shared_layers"] == 1


def test_the_periods_of_the_table_are_those_of_transformers() -> None:
    from transformers import CONFIG_MAPPING

    for kind, periods in _OWN_PERIODS.items():
        known = CONFIG_MAPPING[kind].from_dict({"num_hidden_layers": 48})
        for key, period in periods.items():
            found = getattr(known, key, None)
            if found is None:
                kinds = known.layer_types
                shifts = (n for n in range(1, 24) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))
                found = next(shifts)
            assert found == period, (kind, key)


def test_settings_that_nobody_here_knows_are_named() -> None:
    config = {"model_type": "novel", "num_hidden_layers": 2, "fancy_layer_map": {"0": 1}, "widths": [8, 16]}
    result, notes = edited(config, [1])
    assert {**result, "num_hidden_layers": 2} == config
    assert notes == [
        "config.json: may depend on the layers, and is as it was: fancy_layer_map, widths",
        "config.json: whether layers of a novel differ by their number is not known here",
    ]


def test_windows_that_slide_in_ways_of_their_own_are_doubted() -> None:
    config = {"model_type": "qwen2_moe", "num_hidden_layers": 2, "max_window_layers": 2, "use_sliding_window": True}
    (note,) = edited(config, [1])[1]
    assert note == "config.json: whether layers of a qwen2_moe differ by their number is not known here"


def test_nothing_is_said_where_all_layers_stay_where_they_are() -> None:
    config = {"model_type": "gemma2", "num_hidden_layers": 2, "fancy_layer_map": {"0": 1}, "num_kv_shared_layers": 1}
    assert edited(config, [0, 1]) == (config, [])


def test_lists_of_exceptions_that_name_layers_are_pointed_out() -> None:
    ignore = {"ignore": ["lm_head", r"re:.*layers\.1\..*", "re:.*layers.[01].x"]}
    config = {"model_type": "llama", "num_hidden_layers": 2, "quantization_config": ignore}
    result = keep_layers(model(llama_names(2), config), "1")
    assert result.warnings == ("model/config.json: names layers by their old numbers, in quantization_config",)
    assert result.config()["quantization_config"] == ignore


def test_lists_of_modules_get_the_new_numbers_of_their_layers() -> None:
    names = ["lm_head", "model.layers.0.mlp.gate", "model.layers.2.mlp.gate", "language_model.model.layers.2"]
    other = ["vision_tower.encoder.layers.0.fc", "re:.*lm_head", "model.layers"]
    method = {"ignore": [*names, *other], "modules_to_not_convert": ["model.layers.1.mlp.experts.1.w1"]}
    config = {"model_type": "llama", "num_hidden_layers": 3, "quantization_config": method}
    result = keep_layers(model(llama_names(3), config), "2,0,2")
    assert result.warnings == ()
    layers = [f"model.layers.{number}.mlp.gate" for number in (1, 0, 2)]
    inner = [f"language_model.model.layers.{number}" for number in (0, 2)]
    found = result.config()["quantization_config"]
    assert found == {"ignore": ["lm_head", *layers, *inner, *other], "modules_to_not_convert": []}


def _derived(config: Any) -> dict[str, list[Any]]:
    """The lists with an entry for each layer that transformers makes of a configuration."""
    found = {name: getattr(config, name, None) for name in ("layer_types", "mlp_layer_types", "layers_block_type")}
    return {name: list(value) for name, value in found.items() if value and len(value) == config.num_hidden_layers}


def test_what_is_not_refused_or_doubted_transformers_reads_as_it_was_meant() -> None:
    from transformers import CONFIG_MAPPING

    order, silent = [0, *range(2, 12)], []
    for kind in CONFIG_MAPPING:
        written: Config = {"model_type": kind, "num_hidden_layers": 12}
        try:
            result, notes = edited(written, order)
        except UsageError:
            continue
        if notes:
            continue
        known = CONFIG_MAPPING[kind]
        before, after = known.from_dict(written), known.from_dict(result)
        expected = {name: [value[i] for i in order] for name, value in _derived(before).items()}
        assert _derived(after) == expected, kind
        silent.append(kind)
    assert {"llama", "mistral", "qwen3_moe", "gpt2"} <= set(silent)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss", "qwen3_next", "mimo_v2_flash", "lfm2", "llama4_text"])
def test_what_transformers_writes_of_each_layer_follows_it(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[kind]
    before = known()
    order = [0, *range(2, before.num_hidden_layers), 3]
    after = known.from_dict(edited(before.to_dict(), order)[0])
    assert _derived(before)
    assert _derived(after) == {name: [value[i] for i in order] for name, value in _derived(before).items()}


# --- whole models -------------------------------------------------------------------------------------------------


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    )


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=4, n_head=4))


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    size = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(**size, **heads, sliding_window=4, layer_types=types))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    size = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0, 2]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **heads, **moe))


def _gemma(kind: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings_ = {**(GEMMA_3N if kind == "gemma3n_text" else GEMMA_4), "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    settings_ |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size": 50, "pad_token_id": 0}
    settings_ |= {"bos_token_id": 1, "eos_token_id": 2, "vocab_size_per_layer_input": 50}
    if kind == "gemma3n_text":
        settings_ |= {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.5]}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings_))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _gemma3n() -> Any:
    return _gemma("gemma3n_text")


def _gemma4() -> Any:
    return _gemma("gemma4_text")


def _choose_packed(body: Any, order: list[int], count: int) -> None:
    """Choose layers in the parameters of Gemma 3n and 4 that hold a part for each."""
    with torch.no_grad():
        for name, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
            module = getattr(body, name, None)
            if module is not None:
                parts = module.weight.chunk(count, axis)
                module.weight = torch.nn.Parameter(torch.cat([parts[layer] for layer in order], axis))


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        *((make, layers) for make in (_llama, _gpt2, _gemma3, _qwen3_moe) for layers in ("0,1,3", "0-2,1-3")),
        *((make, layers) for make in (_gemma3n, _gemma4) for layers in ("0,1,3", "0,1,2,2,3", "0,0,1,3")),
    ],
)
def test_the_edited_model_computes_what_the_edited_stack_computes(
    tmp_path: Path, make: Callable[[], Any], layers: str
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    whole = make().eval()
    whole.save_pretrained(tmp_path / "raw")
    result = weightops.shard(tmp_path / "raw", tmp_path / "out", layers=layers)
    assert result.warnings == ()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    body = whole.model if hasattr(whole, "model") else whole.transformer
    name = "layers" if hasattr(body, "layers") else "h"
    order, _ = parse_layers(layers, 4)
    setattr(body, name, torch.nn.ModuleList([getattr(body, name)[i] for i in order]))
    body.config.num_hidden_layers = len(order)
    _choose_packed(body, order, 4)
    if getattr(body.config, "layer_types", None):
        body.config.layer_types = [body.config.layer_types[i] for i in order]
    tokens = torch.arange(12)[None] % 50
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits
        assert torch.equal(loaded.eval()(tokens, use_cache=False).logits, expected)


def test_config_json_stays_as_it_is_but_for_the_layers(tmp_path: Path) -> None:
    tensors = {name: torch.randn(4, 4) for name in llama_names(3)}
    config = {"_name_or_path": "x", "num_hidden_layers": 3, "vocab_size": 7}
    write_checkpoint(tmp_path / "raw", tensors, config)
    weightops.shard(tmp_path / "raw", tmp_path / "out", layers="0,2")
    before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("raw", "out"))
    assert after == {**before, "num_hidden_layers": 2}
    assert list(after) == list(before)
