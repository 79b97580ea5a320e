"""A language model out of one that sees answers as it did within, to the bit; and back in its place it is the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vision_models import WHOLES, save_whole

import weightops
from weightops.errors import IncompatibleInputs, UsageError
from weightops.layouts.parts import CLASSES

IDS = torch.tensor([[5, 9, 17, 33, 64, 12]])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("in_memorys_names", [False, True], ids=["as published", "names of memory"])
@pytest.mark.parametrize("kind", WHOLES)
def test_alone_it_says_what_it_said_within(kind: str, in_memorys_names: bool, tmp_path: Path) -> None:
    whole = save_whole(kind, tmp_path / "whole", in_memorys_names=in_memorys_names)
    weightops.part(tmp_path / "whole", tmp_path / "text", take="text")
    alone, report = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(alone.eval()(IDS).logits, whole(input_ids=IDS).logits)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert not {"vision_config", "text_config", "image_token_id", "image_token_index"} & config.keys()
    assert config["architectures"] == [type(alone).__name__]
    weightops.part(tmp_path / "whole", tmp_path / "again", graft=tmp_path / "text")
    assert same(tmp_path / "again", tmp_path / "whole")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()


def test_a_trained_language_model_takes_the_place_of_the_other(tmp_path: Path) -> None:
    save_whole("gemma3", tmp_path / "whole")
    weightops.part(tmp_path / "whole", tmp_path / "text", take="text")
    (tmp_path / "text" / "weightops-manifest.json").unlink()
    tuned = {name: tensor + 1 for name, tensor in tensors(tmp_path / "text").items()}
    save_file(tuned, tmp_path / "text" / "model.safetensors", {"format": "pt"})
    weightops.part(tmp_path / "whole", tmp_path / "out", graft=tmp_path / "text")
    weightops.part(tmp_path / "out", tmp_path / "check", take="text")
    assert same(tmp_path / "check", tmp_path / "text")
    before, after = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(("vision", "multi")))


def test_a_whole_may_be_grafted_for_its_language_model(tmp_path: Path) -> None:
    save_whole("llava", tmp_path / "one")
    save_whole("llava", tmp_path / "other", seed=1)
    weightops.part(tmp_path / "one", tmp_path / "out", graft=tmp_path / "other")
    one, other, out = (tensors(tmp_path / name) for name in ("one", "other", "out"))
    for name, tensor in out.items():
        assert torch.equal(tensor, (other if name.startswith("language_model") else one)[name])


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "qwen3_vl"])
def test_a_tower_alone_is_that_of_the_whole(kind: str, tmp_path: Path) -> None:
    whole = save_whole(kind, tmp_path / "whole")
    weightops.part(tmp_path / "whole", tmp_path / "tower", take="vision")
    alone, report = AutoModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    part = whole.model.visual if kind.startswith("qwen") else whole.model.vision_tower
    state = part.state_dict()
    found = alone.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)


class TestRefused:
    def test_a_language_model_has_none_within(self, tmp_path: Path) -> None:
        save_tiny(tmp_path / "model", "llama")
        with pytest.raises(UsageError, match="has no language model within a larger one"):
            weightops.part(tmp_path / "model", tmp_path / "out", take="text")

    def test_a_graft_with_more_rows(self, tmp_path: Path) -> None:
        save_whole("llava", tmp_path / "whole")
        weightops.part(tmp_path / "whole", tmp_path / "text", take="text")
        grown = tensors(tmp_path / "text")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            grown[name] = torch.cat([grown[name], grown[name][:1]])
        save_file(grown, tmp_path / "text" / "model.safetensors", {"format": "pt"})
        with pytest.raises(IncompatibleInputs, match=r"is \[97, 32\], expected \[96, 32\]") as raised:
            weightops.part(tmp_path / "whole", tmp_path / "out", graft=tmp_path / "text")
        assert "weightops vocab" in str(raised.value.hint)
        assert not (tmp_path / "out").exists()

    def test_a_graft_that_is_tied_otherwise(self, tmp_path: Path) -> None:
        save_whole("llava", tmp_path / "whole")
        weightops.part(tmp_path / "whole", tmp_path / "text", take="text")
        tied = tensors(tmp_path / "text")
        del tied["lm_head.weight"]
        save_file(tied, tmp_path / "text" / "model.safetensors", {"format": "pt"})
        with pytest.raises(IncompatibleInputs, match="its embeddings are tied") as raised:
            weightops.part(tmp_path / "whole", tmp_path / "out", graft=tmp_path / "text")
        assert "--untie" in str(raised.value.hint)

    def test_a_graft_of_another_model(self, tmp_path: Path) -> None:
        save_whole("llava", tmp_path / "whole")
        save_tiny(tmp_path / "other", "llama")
        with pytest.raises(IncompatibleInputs, match="not the language model of whole"):
            weightops.part(tmp_path / "whole", tmp_path / "out", graft=tmp_path / "other")

    def test_a_whole_that_lacks_a_tensor_of_its_language_model(self, tmp_path: Path) -> None:
        save_whole("mistral3", tmp_path / "whole")
        less = tensors(tmp_path / "whole")
        del less["language_model.model.norm.weight"]
        save_file(less, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
        with pytest.raises(IncompatibleInputs, match=r"the result would not load: .*model\.norm\.weight"):
            weightops.part(tmp_path / "whole", tmp_path / "out", take="text")
        assert not (tmp_path / "out").exists()


def test_classes_are_those_of_transformers() -> None:
    assert all(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] == name for kind, name in CLASSES.items())


def changed(folder: Path, *gone: str, **settings: Any) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in gone}
    path.write_text(json.dumps({**config, **settings}))
    (folder / "weightops-manifest.json").unlink(missing_ok=True)


def text_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["text_config"]
    return found


def test_a_language_model_of_no_type_is_what_the_whole_takes_it_for(tmp_path: Path) -> None:
    whole = save_whole("llava", tmp_path / "whole")
    inner = text_config(tmp_path / "whole")
    del inner["model_type"]
    changed(tmp_path / "whole", text_config=inner)
    weightops.part(tmp_path / "whole", tmp_path / "text", take="text")
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()(IDS).logits
        assert torch.equal(alone, whole(input_ids=IDS).logits)


def test_patterns_of_quantised_modules_follow_the_names(tmp_path: Path) -> None:
    save_whole("llava", tmp_path / "whole")
    patterns = ["re:vision_tower.*", "re:language_model.model.layers.1.mlp.*", "language_model.lm_head", "re:.*k_proj"]
    changed(tmp_path / "whole", quantization_config={"quant_method": "compressed-tensors", "ignore": patterns})
    weightops.part(tmp_path / "whole", tmp_path / "text", take="text")
    ignored = json.loads((tmp_path / "text" / "config.json").read_text())["quantization_config"]["ignore"]
    mlp = [f"model.layers.1.mlp.{part}_proj" for part in ("down", "gate", "up")]
    assert sorted(ignored) == sorted(["re:vision_tower.*", *mlp, "lm_head", "re:.*k_proj"])


class TestRefusedForSettings:
    @pytest.mark.parametrize(
        ("outer", "inner", "message"),
        [
            ({"tie_word_embeddings": "false"}, {}, r"tie_word_embeddings is 'false', expected true or false"),
            ({}, {"model_type": ["llama"]}, r"text_config\.model_type is \['llama'\], expected text"),
            ({}, {"model_type": ""}, r"text_config\.model_type is '', expected text"),
        ],
    )
    def test_a_config_of_wrong_types(
        self, outer: dict[str, Any], inner: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        save_whole("llava", tmp_path / "whole")
        changed(tmp_path / "whole", text_config={**text_config(tmp_path / "whole"), **inner}, **outer)
        with pytest.raises(UsageError, match=message):
            weightops.part(tmp_path / "whole", tmp_path / "out", take="text")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_attention_heads": 8}, r"num_attention_heads is 8, expected 4 as in whole"),
            ({"head_dim": 4}, "head_dim is 4, expected 8"),
            ({"tie_word_embeddings": True}, "tie_word_embeddings is true, and whole is otherwise"),
            ({"quantization_config": {"quant_method": "fp8"}}, "its weights are fp8, expected plain as in whole"),
        ],
    )
    def test_a_graft_whose_numbers_mean_something_else(
        self, settings: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        save_whole("llava", tmp_path / "whole")
        weightops.part(tmp_path / "whole", tmp_path / "text", take="text")
        changed(tmp_path / "text", **settings)
        with pytest.raises(IncompatibleInputs, match=message):
            weightops.part(tmp_path / "whole", tmp_path / "out", graft=tmp_path / "text")
        assert not (tmp_path / "out").exists()

    def test_a_graft_of_another_type_is_said(self, tmp_path: Path) -> None:
        save_whole("llava", tmp_path / "whole")
        weightops.part(tmp_path / "whole", tmp_path / "text", take="text")
        changed(tmp_path / "text", model_type="mistral")
        result = weightops.part(tmp_path / "whole", tmp_path / "out", graft=tmp_path / "text")
        assert any("model_type is mistral, was llama" in note for note in result.warnings)
