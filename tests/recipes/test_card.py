"""Model cards, as the hub's own reader and Markdown understand them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import given_tensor, random_tensor

from weightops.checkpoint import Checkpoint
from weightops.engine.run import run
from weightops.formats.proofs.manifest import NAME as MANIFEST
from weightops.formats.proofs.manifest import read_manifest
from weightops.io.escape import is_harmless
from weightops.plan import Plan, make_plan
from weightops.recipes.card import card, hub_id, quantization_of, render_card
from weightops.spec import DType

RECIPE = {
    "tensors": {
        "tuned": {"recover": {"raw": "raw", "diff": "delta"}},
        "merged": {"merge-lora": {"base": "tuned", "adapter": ["one", "two"], "weight": [1.0, 0.5]}},
        "result": {"shard": {"source": "merged", "drop": ["*.inv_freq"]}},
    },
    "output": {"from": "result"},
}
SOURCES = {"raw": "hf://meta-llama/Llama-2-7b-hf@0123abc", "delta": "delta", "one": "one", "two": "org/two"}


def rendered(**changes: Any) -> str:
    plain: dict[str, Any] = {
        "title": "zhixi-13b",
        "base_models": ["meta-llama/Llama-2-13b-hf"],
        "relation": "finetune",
        "library": "transformers",
        "steps": ["merged: merge-lora base=raw"],
        "files": {"model-00001-of-00002.safetensors": 5_000_000_000, "model-00002-of-00002.safetensors": 1},
    }
    return render_card(**{**plain, **changes}).decode()


def metadata(text: str) -> dict[str, Any]:
    """The front matter, as the hub's client reads it."""
    found: dict[str, Any] = HubCard(text, ignore_metadata_errors=False).data.to_dict()
    assert found == yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_hub_reads_base_model_relation_and_library() -> None:
    assert metadata(rendered()) == {
        "library_name": "transformers",
        "base_model": "meta-llama/Llama-2-13b-hf",
        "base_model_relation": "finetune",
        "tags": ["weightops"],
    }


def test_several_base_models_are_a_list() -> None:
    found = metadata(rendered(base_models=["a/x", "hf://b/y@main"], relation="merge"))
    assert (found["base_model"], found["base_model_relation"]) == (["a/x", "b/y"], "merge")
    assert found["tags"] == ["weightops", "mergekit", "merge"]
    assert metadata(rendered(base_models=["a/x", "b/y"], relation="finetune"))["tags"] == ["weightops"]


def test_a_folder_is_named_in_a_comment_and_not_as_a_base_model() -> None:
    text = rendered(base_models=["llama-13b"])
    assert metadata(text).keys() == {"library_name", "tags"}
    assert "\n# base_model: llama-13b is no repository on the hub\n---\n" in text


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=30), st.from_regex(r"[\w.-]{1,10}/[\w.-]{1,10}", fullmatch=True)))
def test_every_base_model_is_an_id_that_the_hub_takes(name: str) -> None:
    found = hub_id(name)
    if found is not None:
        validate_repo_id(found)
        assert found == name
    elif "/" in name and not name.startswith("hf://"):
        with pytest.raises(HFValidationError):
            validate_repo_id(name)


hostile = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    ["---\nlicense: mit\n---", "a\nb: c", "`x` ``", "[a](javascript:b)", "<script>", "\x1b[31m", "# x\r\nlicense: mit"]
)


@given(hostile, hostile, hostile, hostile)
def test_names_from_files_say_nothing_but_themselves(title: str, base: str, step: str, warning: str) -> None:
    assume(hub_id(base) is None)
    text = rendered(title=title, base_models=[base], steps=[step], warnings=[warning], library="peft")
    assert metadata(text).keys() <= {"library_name", "base_model", "base_model_relation", "tags"}
    plain = rendered(title="XXX", base_models=["XXX"], steps=["XXX"], warnings=["XXX"], library="peft")
    for line, usual in zip(text.splitlines(), plain.splitlines(), strict=True):
        assert line == usual or (is_harmless(line) and "XXX" in usual)
    assert "<script>" not in text.partition("\n---\n\n")[2].replace("`<script>`", "")


def test_the_text_says_what_it_holds_and_how_to_check_it() -> None:
    text = rendered(content_id="ab" * 32, dtypes={"float16": 1_000_000}, warnings=["left out: a"])
    for line in (
        "# zhixi-13b",
        "1. `merged: merge-lora base=raw`",
        "- 2 weight files, 5,000,000,001 bytes",
        "- 1,000,000 elements of float16",
        f"- content id `{'ab' * 32}`: the same in whatever files these tensors are",
        "`weightops verify .` holds the folder against its `weightops-manifest.json`.",
        "- left out: a",
    ):
        assert line in text.split("\n")


def test_a_recipe_gives_the_base_that_the_result_descends_from() -> None:
    found = card("x", RECIPE, SOURCES, files={})
    assert found.base_models == ("hf://meta-llama/Llama-2-7b-hf@0123abc",)
    assert (found.relation, found.library) == ("finetune", "transformers")
    assert found.steps == (
        "tuned: recover raw=raw diff=delta",
        'merged: merge-lora base=tuned adapter=["one", "two"] weight=[1.0, 0.5]',
        'result: shard source=merged drop=["*.inv_freq"]',
    )


@pytest.mark.parametrize(
    ("step", "output", "relation", "library"),
    [
        ({"extract-lora": {"base": "raw", "tuned": "one", "rank": 8}}, {}, "adapter", "peft"),
        ({"cast": {"source": "raw", "scheme": "fp8"}}, {}, "quantized", "transformers"),
        ({"cast": {"source": "raw", "dtype": "bfloat16"}}, {}, None, "transformers"),
        ({"merge-lora": {"base": "raw", "adapter": "one"}}, {"scheme": "fp8"}, "quantized", "transformers"),
        ({"shard": {"source": "raw"}}, {"dtype": "float16"}, None, "transformers"),
        ({"convert": {"source": "raw", "to": "gguf", "dtype": "q8_0"}}, {}, "quantized", None),
    ],
)
def test_the_last_step_that_the_hub_has_a_word_for_is_the_relation(
    step: dict[str, Any], output: dict[str, Any], relation: str | None, library: str | None
) -> None:
    found = card("x", {"tensors": {"r": step}, "output": {"from": "r", **output}}, SOURCES, files={})
    assert (found.base_models, found.relation, found.library) == ((SOURCES["raw"],), relation, library)
    assert len(found.steps) == 1 + bool(output)


@pytest.mark.parametrize(
    ("step", "library"),
    [
        ({"combine-adapters": {"adapter": ["one", "two"], "method": "svd"}}, "peft"),
        ({"resize-adapter": {"adapter": "one", "rank": 4}}, "peft"),
        ({"convert-adapter": {"adapter": "one", "to": "mlx"}}, None),
    ],
)
def test_what_adapters_were_trained_on_no_recipe_says(step: dict[str, Any], library: str | None) -> None:
    found = card("x", {"tensors": {"r": step}, "output": {"from": "r"}}, SOURCES, files={})
    assert (found.base_models, found.relation, found.library) == ((), None, library)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ""),
        ("gptq", ""),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits, in groups of 128"),
        ({"quant_method": "gptq", "bits": 3, "group_size": -1}, "gptq, 3 bits"),
        ({"quant_method": "fp8", "bits": "many"}, "fp8"),
        ({"quant_method": ["x"]}, "quantised"),
    ],
)
def test_how_a_model_is_quantised_is_what_its_config_says(config: object, expected: str) -> None:
    assert quantization_of({"quantization_config": config}) == expected
    assert quantization_of({}) == ""


def test_a_quantised_model_names_its_base_and_its_bits() -> None:
    step = {"source": "source", "bits": 4, "calibration": [{"name": "a.txt", "sha256": "00"}]}
    recipe = {"tensors": {"quantized": {"quantize": step}}, "output": {"from": "quantized"}}
    made = card("m", recipe, {"source": "hf://org/name@abc"}, files={}, quantization="gptq, 4 bits, in groups of 128")
    found = made.render({}, {}, {}).decode()
    assert metadata(found)["base_model"] == "org/name"
    assert metadata(found)["base_model_relation"] == "quantized"
    assert "It is quantised: gptq, 4 bits, in groups of 128." in found
    assert "bits=4" in found


def test_a_delta_is_no_version_of_a_model() -> None:
    recipe = {"tensors": {"r": {"diff": {"raw": "raw", "tuned": "one"}}}, "output": {"from": "r"}}
    found = card("x", recipe, SOURCES, files={})
    assert (found.base_models, found.relation, found.library) == ((), None, None)


def test_what_was_saved_without_a_recipe_has_no_base() -> None:
    found = card("x", {"operation": "save", "from": "x"}, {}, files={})
    assert (found.base_models, found.steps) == ((), ())
    assert metadata(found.render({}, {}, {}).decode()) == {"library_name": "transformers", "tags": ["weightops"]}


def test_the_card_is_written_with_the_content_id_of_the_tensors_beside_it(tmp_path: Path) -> None:
    tensors = {
        "a": given_tensor(random_tensor(DType.F16, (3, 4), 0)),
        "b": given_tensor(random_tensor(DType.F32, (2,), 1)),
    }
    document = card("x", RECIPE, SOURCES, files={"model.safetensors": 7})
    plan = make_plan(Checkpoint("x", tensors, documents=(document,)), {})
    assert Plan.from_json(plan.to_json()).documents == (document,)
    run(plan, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert f"- content id `{read_manifest(tmp_path / 'out' / MANIFEST).content_id}`" in text
    assert "- 12 elements of float16\n- 2 elements of float32\n" in text
    assert metadata(text)["base_model"] == "meta-llama/Llama-2-7b-hf"
