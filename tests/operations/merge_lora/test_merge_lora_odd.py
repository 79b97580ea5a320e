"""merge-lora where base and adapter fit in an unusual way, which is merged, or nearly fit, which is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Made, State, edit_config, edit_tensors, load_model, merged_by_peft, state
from safetensors.torch import save_file

import weightops
from weightops.errors import CorruptInput, IncompatibleInputs, WeightopsError
from weightops.formats.adapter import values as adapter_values

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def rewritten(base: Path, out: Path, edit: Callable[[State], object], **config: Any) -> Path:
    """A copy of a model with other tensors and settings."""
    shutil.copytree(base, out)
    tensors = state(base)
    edit(tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    settings = {**json.loads((out / "config.json").read_text()), **config}
    (out / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return out


def nothing(tensors: State) -> None:
    """No edit."""


# --- merged all the same ------------------------------------------------------------------------------------------


def test_bases_whose_files_stack_the_experts(made: Made, tmp_path: Path) -> None:
    """As transformers has them in memory; the router is a parameter beside them."""
    base = made.base("qwen3_moe", "bf16")
    stacked = tmp_path / "stacked"
    shutil.copytree(base, stacked)
    save_file(load_model(base).state_dict(), stacked / "model.safetensors", metadata={"format": "pt"})
    gate = "base_model.model.model.layers.0.mlp.gate"
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter("qwen3_moe", **EXPERTS), adapter)
    factors = {f"{gate}.lora_A.weight": torch.ones(4, 64), f"{gate}.lora_B.weight": torch.ones(4, 4) * 0.1}
    edit_tensors(adapter, lambda tensors: tensors | factors)
    for folder in (base, stacked):
        weightops.merge_lora(folder, adapter, tmp_path / f"{folder.name}-merged")
    expected = load_model(tmp_path / f"{base.name}-merged").state_dict()
    found = state(tmp_path / "stacked-merged")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_layer_called_gate_is_no_router(made: Made, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate.weight"
    base = rewritten(made.base("llama", "bf16"), tmp_path / "base", lambda t: t.update({name: torch.ones(72, 72)}))
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter(target_modules=["q_proj"]), adapter)
    renamed = {n.replace("self_attn.q_proj", "mlp.gate"): t for n, t in state(adapter).items() if "layers.0" in n}
    edit_tensors(adapter, lambda tensors: renamed)
    weightops.merge_lora(base, adapter, tmp_path / "out")
    a, b = (renamed[f"base_model.model.model.layers.0.mlp.gate.lora_{letter}.weight"] for letter in "AB")
    assert torch.equal(state(tmp_path / "out")[name], torch.ones(72, 72) + 1.5 * (b @ a))


def test_a_tied_head_that_the_files_call_otherwise_gets_the_name_that_peft_gives_it(made: Made, tmp_path: Path) -> None:
    base, adapter = made.base("gemma3", "bf16"), made.adapter("gemma3", modules_to_save=["embed_tokens"])
    expected, _ = merged_by_peft(base, [adapter], tmp_path / "peft")
    weightops.merge_lora(base, adapter, tmp_path / "out")
    found = state(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_vocabulary_that_a_part_of_the_config_has(made: Made, tmp_path: Path) -> None:
    adapter = made.adapter("gemma3", rows=110, modules_to_save=["embed_tokens", "lm_head"])
    base = rewritten(made.base("gemma3"), tmp_path / "base", nothing, vocab_size=96)
    weightops.merge_lora(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["text_config"]["vocab_size"]) == (110, 110)


def test_without_a_config_somebody_has_to_say_that_embeddings_are_untied(made: Made, tmp_path: Path) -> None:
    base = rewritten(made.base("tied"), tmp_path / "base", nothing)
    (base / "config.json").unlink()
    found = weightops.merge_lora(base, made.adapter("tied", modules_to_save=["lm_head"]), tmp_path / "out")
    assert "the embeddings are no longer tied, and there is no config.json to say so" in found.warnings


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_two_adapters_with_vocabularies_of_their_own_are_merged_one_after_the_other(
    made: Made, tmp_path: Path, kind: str
) -> None:
    """As Chinese-Alpaca-Plus is: an adapter for a larger vocabulary, and another on top of it."""
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapters = [made.adapter(kind, rows=rows, seed=rows, **whole) for rows in (110, 111)]
    base = made.base(kind)
    with pytest.raises(IncompatibleInputs, match=r"both replace model\.embed_tokens\.weight") as caught:
        weightops.merge_lora(base, adapters, tmp_path / "both")
    assert caught.value.hint == "merge the first into the base, and the second into the result"
    expected, _ = merged_by_peft(base, adapters[:1], tmp_path / "peft-1", rows=110)
    expected, _ = merged_by_peft(tmp_path / "peft-1", adapters[1:], tmp_path / "peft-2", rows=111)
    weightops.merge_lora(base, adapters[0], tmp_path / "one")
    weightops.merge_lora(tmp_path / "one", adapters[1], tmp_path / "two")
    found = state(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_factors_are_looked_at_in_parts_of_any_size(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter(), adapter)
    weightops.merge_lora(made.base(), adapter, tmp_path / "expected")
    monkeypatch.setattr(adapter_values, "_BATCH_NBYTES", 1)
    weightops.merge_lora(made.base(), adapter, tmp_path / "found")
    assert all(torch.equal(t, state(tmp_path / "found")[n]) for n, t in state(tmp_path / "expected").items())
    last = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(adapter, lambda t: t | {last: torch.full_like(t[last], float("inf"))})
    with pytest.raises(CorruptInput, match=f"{last} holds values that are no numbers"):
        weightops.merge_lora(made.base(), adapter, tmp_path / "out")


# --- refused ------------------------------------------------------------------------------------------------------


def without(pattern: str) -> Callable[[State], object]:
    return lambda t: [t.pop(name) for name in list(t) if re.search(pattern, name)]


def moved(t: State) -> None:
    """Embeddings whose names say nothing, and no head."""
    for name in list(t):
        t[name.replace("model.", "net.", 1)] = t.pop(name)


def twice(t: State) -> None:
    t.update({f"{tower}.embed_tokens.weight": torch.ones(101, 72) for tower in ("a", "b")})
    del t["model.embed_tokens.weight"]


def with_old_names(tensors: State) -> State:
    return tensors | {n.replace("model.model.layers.0", "model.layers.0"): t for n, t in tensors.items()}


CASES: dict[str, tuple[str, Callable[[State], object], dict[str, Any], Any, dict[str, Any], type[Exception], str]] = {
    "a head whose name is not known": (
        *("tied", moved, {"modules_to_save": ["embed_tokens"]}, None, {"architectures": None}),
        *(IncompatibleInputs, "embed_tokens.weight is no longer tied, and what the output embedding is called"),
    ),
    "tied embeddings that differ in the file": (
        *("tied", lambda t: t.update({"lm_head.weight": torch.ones(101, 72)}), {"trainable_token_indices": [1, 5]}),
        *(None, {}, CorruptInput, "which config.json ties: the values differ"),
    ),
    "integers where something is loaded": (
        *("llama", lambda t: t.update({"lm_head.weight": torch.ones(101, 72, dtype=torch.int8)})),
        *({"modules_to_save": ["lm_head"]}, None, {}),
        *(IncompatibleInputs, r"lm_head.weight is int8 \[101, 72\], expected floating-point numbers"),
    ),
    "one tensor by two names": (
        *("llama", nothing, {"target_modules": ["q_proj"]}, with_old_names, {}),
        *(CorruptInput, "and another module of the adapter both are model.layers.0.self_attn.q_proj.weight"),
    ),
    "DoRA of tied embeddings": (
        *("tied", nothing, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, None, {}),
        *(IncompatibleInputs, "DoRA of the one, and other factors of the other of two tied embeddings"),
    ),
    "a bias of another size": (
        *("biased", nothing, {"target_modules": ["q_proj"], "lora_bias": True}),
        *(lambda t: {n: v[:9] if n.endswith("lora_B.bias") else v for n, v in t.items()}, {}),
        *(IncompatibleInputs, r"self_attn.q_proj.bias: "),
    ),
    "an expert without one of its layers": (
        *("qwen3_moe", without(r"experts\.1\.up_proj"), EXPERTS, None, {}),
        *(IncompatibleInputs, "mlp.experts: the base has no gate_up_proj there"),
    ),
    "more experts' layers than the config has": (
        *("qwen3_moe", nothing, {**EXPERTS, "edited": {"target_parameters": ["experts.down_proj"]}}, None, {}),
        *(IncompatibleInputs, "which of the parameters down_proj the factors are for is not known here"),
    ),
    "experts with more rows": (
        *("qwen3_moe", nothing, {**EXPERTS, "target_parameters": ["experts.down_proj"]}),
        *(lambda t: {n: torch.cat([v, v]) if "experts.lora_B" in n else v for n, v in t.items()}, {}),
        *(IncompatibleInputs, r"lora_B is float32 \[128, 16\], the experts of the base have 64 rows"),
    ),
    "factors of a head that is not there": (
        *("llama", without("lm_head"), {"target_modules": ["lm_head"]}),
        *(lambda t: {n: v for n, v in t.items() if "base_layer" not in n}, {}),
        *(IncompatibleInputs, "lm_head: the base has no such tensor"),
    ),
    "an embedding of which there are two": (
        *("llama", twice, {"modules_to_save": ["embed_tokens"]}, None, {}),
        *(IncompatibleInputs, "embed_tokens.weight may be a.embed_tokens.weight or b.embed_tokens.weight"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_nearly_fits_is_refused(made: Made, tmp_path: Path, case: str) -> None:
    kind, edit, settings, change, config, error, words = CASES[case]
    edited = settings.get("edited", {})
    base = rewritten(made.base(kind), tmp_path / "base", edit, **config)
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter(kind, **{k: v for k, v in settings.items() if k != "edited"}), adapter)
    edit_config(adapter, **edited)
    if change is not None:
        edit_tensors(adapter, change)
    with pytest.raises(WeightopsError, match=words) as caught:
        weightops.merge_lora(base, adapter, tmp_path / "out")
    assert isinstance(caught.value, error)


def test_factors_of_what_another_adapter_holds_whole(made: Made, tmp_path: Path) -> None:
    factors = tmp_path / "factors"
    shutil.copytree(made.adapter(target_modules=["lm_head"]), factors)
    edit_tensors(factors, lambda tensors: {n: t for n, t in tensors.items() if "base_layer" not in n})
    adapters = [made.adapter(modules_to_save=["lm_head"]), factors]
    with pytest.raises(IncompatibleInputs, match="has factors, and the same tensor is held whole in modules_to_save"):
        weightops.merge_lora(made.base(), adapters, tmp_path / "out")
