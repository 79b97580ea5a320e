"""Reading adapters: names in every spelling, patterns as peft matches them, and configs from strangers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, WeightopsError
from weightops.formats.adapter.config import KNOWN
from weightops.formats.adapter.lora import Adapter, read_adapter
from weightops.formats.adapter.names import Kind, Name, Patterns, parse_name
from weightops.formats.folder import open_checkpoint

PATH = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{PATH}.lora_A.weight", f"base_model.model.{PATH}.lora_B.weight"


def adapter(folder: Path, tensors: dict[str, tuple[int, ...]] | None = None, **config: Any) -> Adapter:
    """Write an adapter with tensors of these shapes, and read it."""
    shapes = {A: (4, 8), B: (6, 4)} if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    return read_adapter(open_checkpoint(folder))


# --- names --------------------------------------------------------------------------------------------------------


WRAPPED = [
    f"module.base_model.model.{PATH}.lora_A.weight",
    f"_fsdp_wrapped_module.base_model.model.{PATH}.lora_A.weight",
    f"base_model.model._orig_mod.module.{PATH}.lora_A.default.weight",
    *(
        f"base_model.model.{PATH}.lora_A.weight".replace(".0.", f".0.{wrapper}.")
        for wrapper in ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module")
    ),
    f"base_model.model.{PATH}._fsdp_wrapped_module._checkpoint_wrapped_module.lora_A._orig_mod.weight",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"base_model.model.{PATH}.lora_A.weight", Name(Kind.A, PATH)),
        (f"base_model.model.{PATH}.lora_B.default.weight", Name(Kind.B, PATH)),
        (f"{PATH}.lora_B.my-adapter.weight", Name(Kind.B, PATH)),
        (f"base_model.model._orig_mod.{PATH}.lora_A.weight", Name(Kind.A, PATH)),
        (f"base_model.model.{PATH}.lora_B.bias", Name(Kind.BIAS, PATH)),
        (f"base_model.model.{PATH}.lora_magnitude_vector", Name(Kind.MAGNITUDE, PATH)),
        (f"base_model.model.{PATH}.lora_magnitude_vector.default.weight", Name(Kind.MAGNITUDE, PATH)),
        ("base_model.model.wte.lora_embedding_A", Name(Kind.EMBEDDING_A, "wte")),
        ("base_model.model.wte.lora_embedding_B.default", Name(Kind.EMBEDDING_B, "wte")),
        ("base_model.model.mlp.experts.base_layer.lora_A.weight", Name(Kind.A, "mlp.experts", 1)),
        ("base_model.model.mlp.experts.base_layer.base_layer.lora_B.weight", Name(Kind.B, "mlp.experts", 2)),
        ("base_model.model.lm_head.base_layer.weight", Name(Kind.BASE, "lm_head.weight")),
        ("base_model.model.lm_head.weight", Name(Kind.WHOLE, "lm_head.weight")),
        ("model.embed_tokens.weight", Name(Kind.WHOLE, "model.embed_tokens.weight")),
        ("base_model.model.lm_head.modules_to_save.weight", Name(Kind.COPY, "lm_head.weight")),
        ("base_model.model.lm_head.modules_to_save.default.weight", Name(Kind.COPY, "lm_head.weight")),
        ("base_model.model.lm_head.original_module.weight", Name(Kind.ORIGINAL, "lm_head.weight")),
        ("base_model.model.e.token_adapter.trainable_tokens_delta", Name(Kind.ROWS, "e")),
        ("base_model.model.e.token_adapter.base_layer.weight", Name(Kind.BASE, "e.weight")),
        *((name, Name(Kind.A, PATH)) for name in WRAPPED),
    ],
)
def test_names_are_known_in_every_spelling(text: str, expected: Name) -> None:
    assert parse_name(text, "a") == expected


@pytest.mark.parametrize(
    "text",
    [
        f"base_model.model.{PATH}.lora_A.bias",
        f"base_model.model.{PATH}.lora_diag",
        f"base_model.model.{PATH}.lora_A.a.b.weight",
        f"base_model.model.{PATH}.ranknum",
        "lora_A.weight",
        "base_model.model.weight",
        "base_model.model.a.base_layer.b.weight",
        f"base_model.model.{'x.' * 300}lora_A.weight",
    ],
)
def test_parts_that_lora_does_not_have_are_refused_by_name(text: str) -> None:
    with pytest.raises(IncompatibleInputs, match="is no part of LoRA that is known here"):
        parse_name(text, "a")


# --- patterns -----------------------------------------------------------------------------------------------------

PIECES = ["q_proj", "v_proj", "layers", "0", "1", "mlp", "self_attn"]
KEYS = st.lists(
    st.one_of(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map(".".join),
        st.sampled_from([r".*q_proj", r"^layers\.0\..*", r"layers\.[01]\.mlp", "(q|v)_proj", "mlp.*|v_proj", r"\w+"]),
        st.sampled_from([r"^(?!.*mlp).*_proj$", r".*\.layers\.\d+\..*_proj", "(?:mlp|self_attn)[.](?=q)q_proj"]),
    ),
    unique=True,
    max_size=5,
)


@settings(max_examples=200)
@given(KEYS, st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map(".".join))
def test_patterns_match_as_in_peft(keys: list[str], path: str) -> None:
    numbers = {key: i + 1 for i, key in enumerate(keys)}
    assert Patterns(numbers, "a").find(path) == numbers.get(get_pattern_key(keys, path))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", ".*.*.*.*x", "(", "a{9999999999}", r"(a)\1", "a" * 2000 + "*"])
def test_patterns_that_are_none_or_take_for_ever_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(CorruptInput, match="pattern"):
        adapter(tmp_path / "a", rank_pattern={pattern: 4})


# --- configs ------------------------------------------------------------------------------------------------------


def test_scales_are_those_of_peft(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 3.5}}
    found = adapter(tmp_path / "a", lora_alpha=6, use_rslora=True, **patterns)
    assert (found.rank(PATH), found.rank("v_proj")) == (9, 4)
    assert (found.scale(PATH), found.scale("v_proj")) == (3.5 / 9**0.5, 6 / 4**0.5)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert read_adapter(checkpoint, 0.3).scale("v_proj") == 0.3 * 6 / 4**0.5


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"peft_type": "LOHA"}, IncompatibleInputs, "peft_type LOHA, expected LORA"),
        ({"peft_type": None}, IncompatibleInputs, "peft_type None, expected LORA"),
        (
            {"layer_replication": [[0, 2]]},
            IncompatibleInputs,
            "layer_replication: the layers of the base are replicated",
        ),
        ({"alora_invocation_tokens": [1]}, IncompatibleInputs, "alora_invocation_tokens: aLoRA"),
        ({"arrow_config": {"top_k": 2}}, IncompatibleInputs, "arrow_config: Arrow"),
        ({"megatron_config": {"a": 1}}, IncompatibleInputs, "megatron_config"),
        ({"use_qalora": True}, IncompatibleInputs, "use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, IncompatibleInputs, "pissa_niter_4, which changes the base"),
        ({"init_lora_weights": "else"}, IncompatibleInputs, "init_lora_weights: else, which is not known"),
        ({"r": "8"}, CorruptInput, r"Expected `int`, got `str` - at `\$.r`"),
        ({"r": True}, CorruptInput, "Expected `int`"),
        ({"r": 0}, CorruptInput, "a rank of 0"),
        ({"r": 10**12}, CorruptInput, "a rank of 1000000000000"),
        ({"rank_pattern": {"q": -1}}, CorruptInput, "a rank of -1"),
        ({"rank_pattern": [1]}, CorruptInput, "Expected `object"),
        ({"lora_alpha": None}, CorruptInput, "Expected `float`"),
        ({"lora_alpha": 1e308 * 10}, CorruptInput, "JSON"),
        ({"lora_alpha": 10**400}, CorruptInput, "Number out of range"),
        ({"bias": "some"}, CorruptInput, "Invalid enum value"),
        ({"modules_to_save": "lm_head"}, CorruptInput, "Expected `array"),
        ({"trainable_token_indices": {"a": 1}}, CorruptInput, "Expected `array"),
        ({"trainable_token_indices": [1]}, CorruptInput, "there are no rows"),
        ({"use_dora": True}, CorruptInput, "use_dora: true, but .* has no lora_magnitude_vector"),
        ({"lora_bias": True}, CorruptInput, "lora_bias: true, but .* has no lora_B.bias"),
        ({"use_dora": True, "lora_bias": True}, CorruptInput, "both use_dora and lora_bias"),
    ],
)
def test_configs_that_mean_something_else_or_nothing_are_refused(
    tmp_path: Path, config: dict[str, Any], error: type[WeightopsError], words: str
) -> None:
    with pytest.raises(error, match=words):
        adapter(tmp_path / "a", **config)


def test_settings_that_change_nothing_are_let_through(tmp_path: Path) -> None:
    harmless = {"init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}, "lora_dropout": 0.1, "future": None}
    found = adapter(tmp_path / "a", **harmless)
    assert found.factors.keys() == {(PATH, 0)}
    assert found.notes == ()


def test_every_setting_of_peft_is_read_known_to_change_nothing_or_refused() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= KNOWN


def test_settings_that_peft_does_not_know_are_ignored_as_it_does(tmp_path: Path) -> None:
    found = adapter(tmp_path / "a", some_new_kind={"rate": 2}, unsloth_fixed=True)
    assert found.notes == (
        "a: adapter_config.json has settings that peft does not know, and ignores: some_new_kind, unsloth_fixed",
    )


@pytest.mark.parametrize("text", ["[]", "{", '{"peft_type": "LORA", "r": 1e999}', '{"r": 1, "r": 2}', "\x80"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightopsError, match=r"adapter_config\.json"):
        read_adapter(open_checkpoint(tmp_path / "a"))


def test_a_folder_without_a_config_is_no_adapter(tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(SourceMissing, match=r"a: has no adapter_config\.json") as caught:
        read_adapter(open_checkpoint(tmp_path / "a"))
    assert caught.value.hint == "peft's save_pretrained writes it, with rank and scale: put it beside the adapter"
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(SourceMissing, match=r"has no adapter_config.json") as caught:
        read_adapter(open_checkpoint(tmp_path / "a"))
    assert caught.value.hint == "this is a model, not an adapter"


# --- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({A: (4, 8)}, f"{A} has no lora_B beside it"),
        ({B: (6, 4)}, f"{B} has no lora_A beside it"),
        ({A: (4, 8), B: (6, 4), A.replace("weight", "x.weight"): (4, 8)}, "are the same part of a module"),
        ({A: (4, 8), B: (6, 4), f"{PATH}.lora_embedding_A": (4, 9)}, "has no lora_embedding_B beside it"),
        ({A: (4, 8), B: (6, 4), f"{PATH}.lora_magnitude_vector": (6,)}, "use_dora: false, but .* has a"),
        (
            {A: (4, 8), B: (6, 4), f"{PATH}.lora_embedding_A": (4, 8), f"{PATH}.lora_embedding_B": (6, 4)},
            "cannot both be parts of one module",
        ),
        ({"lm_head.weight": (9, 8), "base_model.model.lm_head.weight": (9, 8)}, "are the same part of a module"),
        (
            {A: (4, 8), B: (6, 4), f"{PATH}.base_layer.weight": (6, 8), f"{PATH}.weight": (6, 8)},
            "same part of a module",
        ),
        ({"lm_head.original_module.weight": (9, 8)}, "has what lm_head.weight was, and nothing in its place"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], words: str
) -> None:
    with pytest.raises(CorruptInput, match=words):
        adapter(tmp_path / "a", tensors)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({A: (0,), B: (0,)}, f"{A} is float32 \\[0\\], without elements"),
        ({A: (4, 8), B: (6, 4), "lm_head.weight": (0,)}, r"lm_head.weight is float32 \[0\], without elements"),
        ({A: (2, 8), B: (3, 4)}, r"is float32 \[2, 8\] and its lora_B float32 \[3, 4\]: they are not of one rank"),
        ({A: (32,), B: (24,)}, "they are not of one rank"),
    ],
)
def test_what_training_on_several_devices_did_not_gather(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], words: str
) -> None:
    with pytest.raises(CorruptInput, match=words) as caught:
        adapter(tmp_path / "a", tensors)
    assert "ZeRO-3 and FSDP save such where parameters were not gathered" in str(caught.value.hint)


def test_integers_are_no_adapter(tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    save_file(
        {A: torch.ones(4, 8, dtype=torch.int8), B: torch.ones(6, 4)}, tmp_path / "a" / "adapter_model.safetensors"
    )
    with pytest.raises(IncompatibleInputs, match=r"lora_A\.weight is int8 \[4, 8\], expected floating-point numbers"):
        read_adapter(open_checkpoint(tmp_path / "a"))
