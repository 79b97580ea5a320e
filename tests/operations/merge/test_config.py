"""What lies beside merged weights: config.json as they are, and the files of one donor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merging import evaluated, model, stage
from support import given_tensor

from weightops.checkpoint import Checkpoint, Written, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.operations.merge import merge
from weightops.operations.merge.result import finished
from weightops.operations.merge.vocabulary import Vocabulary

LINEAR = """\
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 0.5}
"""
SLICES = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [2, 4]}]
"""


def merged(text: str, *models: Checkpoint) -> Checkpoint:
    config = stage(text).plain({each: each.model for each in stage(text).references})
    return merge(models, config=config, text=text, names=[each.name for each in models], evaluate=evaluated)


@pytest.mark.parametrize(("key", "said"), [("torch_dtype", "float16"), ("dtype", "bfloat16")])
def test_the_type_is_that_of_the_tensors_under_the_key_that_is_there(key: str, said: str) -> None:
    a, b = (
        each.with_config(lambda config: {**{k: v for k, v in config.items() if k != "torch_dtype"}, key: said})
        for each in (model("a", dtype=torch.bfloat16), model("b", dtype=torch.float16))
    )
    assert merged(LINEAR, a, b).config() == {**a.config(), key: "float32", "tie_word_embeddings": False}
    assert merged(f"{LINEAR}out_dtype: bfloat16\n", a, b).config()[key] == "bfloat16"


def test_so_it_is_in_the_part_for_the_language_model() -> None:
    text = {"dtype": "bfloat16", "hidden_size": 4, "tie_word_embeddings": True}
    a = model("a", dtype=torch.bfloat16, torch_dtype=None, text_config=text)
    found = merged(f"{LINEAR}dtype: float32\n", a, model("b", dtype=torch.bfloat16)).config()
    assert found["dtype"] == "float32"
    assert found["text_config"] == {"dtype": "float32", "hidden_size": 4, "tie_word_embeddings": False}


def test_files_are_those_of_the_base_or_else_of_the_first_model() -> None:
    def files(name: str) -> dict[str, Any]:
        texts = ("tokenizer.json", "generation_config.json", "LICENSE", "README.md")
        return {text: Written(f"{text} of {name}".encode()) for text in texts}

    models = model("a", sidecars=files("a"), x=1), model("b", sidecars=files("b"), x=2)
    for text, name, x in ((LINEAR, "a", 1), (f"{LINEAR}base_model: b\n", "b", 2)):
        found = merged(text, *models)
        assert found.config()["x"] == x
        assert found.sidecar("tokenizer.json") == f"tokenizer.json of {name}".encode()
        assert found.sidecar("LICENSE") == f"LICENSE of {name}".encode()
        assert found.sidecar("README.md") is None
        assert found.sidecar("mergekit_config.yml") == text.encode()


def test_a_merge_without_a_file_has_what_was_said_beside_it() -> None:
    config = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    found = merge([model("a")], config=config, names=["a"], evaluate=evaluated)
    assert found.sidecar("mergekit_config.yml") == b"merge_method: passthrough\nmodels:\n- model: a\n"


def test_settings_of_single_layers_follow_the_layers() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    a, b = model("a", layer_types=kinds), model("b", layer_types=kinds)
    found = merged(SLICES, a, b).config()
    assert found["num_hidden_layers"] == 3
    assert found["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(IncompatibleInputs, match="differ in what they say of single layers: layer_types"):
        merged(SLICES, a, model("b", layer_types=kinds[1:] + kinds[:1]))


def test_the_layers_of_a_base_that_is_in_no_slice_are_counted_too() -> None:
    text = SLICES.replace("[2, 4]", "[1, 2]") + "base_model: c\n"
    assert merged(text, model("a", 2), model("b", 2), model("c", 4)).config()["num_hidden_layers"] == 2


def test_layers_that_config_json_cannot_describe_are_refused() -> None:
    for text in (SLICES, SLICES.replace("passthrough", "linear\nparameters: {weight: 1}")):
        with pytest.raises(UsageError, match=r"a/config\.json: sliding_window_pattern: layers differ with a period"):
            merged(text, model("a", sliding_window_pattern=2), model("b", sliding_window_pattern=2))


def test_rows_of_another_tokenizer_are_counted_and_its_files_written() -> None:
    files = {"tokenizer.json": Written(b"old"), "merges.txt": Written(b"old"), "LICENSE": Written(b"x")}
    donor = model("a", sidecars=files)
    tensors = {n: given_tensor(torch.ones(8, 4)) if t.spec.shape == (6, 4) else t for n, t in donor.items()}
    vocabulary = Vocabulary({}, {"tokenizer.json": Written(b"new")})
    found = finished(donor, {"a": donor}, tensors, None, vocabulary, "")
    assert found.config()["vocab_size"] == 8
    assert found.sidecars.keys() == {"config.json", "tokenizer.json", "LICENSE", "mergekit_config.yml"}
    assert found.sidecar("tokenizer.json") == b"new"


def test_a_config_that_says_nothing_of_rows_still_says_nothing() -> None:
    donor = model("a", vocab_size=None)
    tensors = {n: given_tensor(torch.ones(8, 4)) if t.spec.shape == (6, 4) else t for n, t in donor.items()}
    assert "vocab_size" not in finished(donor, {"a": donor}, tensors, None, None, "").config()


def test_merges_build_on_merges() -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]

    tied = [model(name, edit=edit, tie_word_embeddings=True) for name in "ab"]
    first = merged(f"name: x\n{LINEAR}", *tied)
    second = merged(
        "merge_method: linear\nmodels: [{model: x}, {model: c}]\nparameters: {weight: 1}\n", first, model("c")
    )
    assert second.config()["tie_word_embeddings"] is False
    assert second["lm_head.weight"].spec == model("c")["lm_head.weight"].spec


def test_a_donor_without_config_gets_none() -> None:
    bare = [Checkpoint(name, dict(model(name).tensors)) for name in "ab"]
    assert merged(LINEAR, *bare).sidecar("config.json") is None
    assert merged(LINEAR, bare[0], model("b")).sidecars.keys() == {"mergekit_config.yml"}


def test_config_json_is_written_in_its_own_order() -> None:
    a = model("a")
    assert a.sidecars["config.json"] == written_json(a.config())
    assert merged(LINEAR, a, model("b")).sidecars["config.json"] == written_json(
        {**a.config(), "tie_word_embeddings": False}
    )
