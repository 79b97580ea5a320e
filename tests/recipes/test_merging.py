"""Merges in recipes and as merge files: what they come to as sources and steps, by name, before anything is opened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from weightops.errors import SourceMissing, UsageError
from weightops.io.yaml_document import read_document
from weightops.operations.merge import parse_stages
from weightops.recipes.merging import Expanded, expand
from weightops.recipes.recipe import Recipe, parse_recipe
from weightops.recipes.steps import Location, Step


def expanded(text: str, *there: str, **options: Any) -> Expanded:
    """What a merge file comes to, where these paths exist."""
    return expand(parse_stages(text, "m.yml", lambda path: path in there), text, "result", options, locate=Location)


def merge_of(*models: str) -> str:
    return "merge_method: linear\nparameters: {weight: 1}\nmodels:\n" + "".join(f"  - model: {m}\n" for m in models)


def test_sources_are_named_after_their_folders_and_repositories() -> None:
    found = expanded(merge_of("./x/base", "../y/base/", "org/name@v1", "hf://org/base"), "./x/base", "../y/base/")
    assert found.sources == {
        "base": Location("./x/base"),
        "base-2": Location("../y/base/"),
        "name": Location("hf://org/name@v1"),
        "base-3": Location("hf://org/base"),
    }
    step = found.steps["result"]
    assert step.inputs == {"models": ("base", "base-2", "name", "base-3")}
    assert [each["model"] for each in step.options["config"]["models"]] == ["base", "base-2", "name", "base-3"]


def test_a_model_that_is_named_twice_is_one_source() -> None:
    found = expanded(f"{merge_of('./a', './b')}base_model: ./a\n", "./a", "./b")
    assert list(found.sources) == ["a", "b"]
    assert found.steps["result"].options["config"]["base_model"] == "a"


def test_no_source_has_the_name_of_the_result() -> None:
    found = expanded(merge_of("./result", "./b"), "./result", "./b")
    assert list(found.sources) == ["result-2", "b"]


def test_an_adapter_is_a_step_before() -> None:
    found = expanded(merge_of("./a+./lora", "./a", "./b+./lora"), "./a", "./b", "./lora")
    assert found.sources == {"a": Location("./a"), "lora": Location("./lora"), "b": Location("./b")}
    assert found.steps["a+lora"] == Step("merge-lora", {"base": ("a",), "adapter": ("lora",)})
    assert found.steps["b+lora"] == Step("merge-lora", {"base": ("b",), "adapter": ("lora",)})
    assert found.steps["result"].inputs == {"models": ("a+lora", "a", "b+lora")}


def test_stages_are_steps_of_their_names_and_the_last_is_the_result() -> None:
    text = f"name: both\n{merge_of('./a', './b')}---\n{merge_of('both', './both')}"
    found = expanded(text, "./a", "./b", "./both", seed=3)
    assert list(found.sources) == ["a", "b", "both-2"]
    assert list(found.steps) == ["both", "result"]
    assert found.steps["result"].inputs == {"models": ("both", "both-2")}
    assert {step.options["seed"] for step in found.steps.values()} == {3}


def test_the_text_of_the_file_is_no_part_of_what_made_the_result() -> None:
    step = expanded(merge_of("./a", "./b"), "./a", "./b").steps["result"]
    elsewhere = expanded(merge_of("/far/a", "/far/b"), "/far/a", "/far/b").steps["result"]
    assert step.given["text"] == merge_of("./a", "./b")
    assert step.said == elsewhere.said


# ---- in recipes

INLINE = """\
sources: {one: ./one, two: ./two, lora: ./lora}
tensors:
  tuned: {merge-lora: {base: two, adapter: lora}}
  both:
    merge:
      method: ties
      base: one
      models: [tuned, ./three]
      parameters: {weight: 0.5}
      seed: 7
outputs:
  out: {from: both}
"""


def recipe(text: str, folder: Path) -> Recipe:
    return parse_recipe(read_document(text, "r.yaml"), folder)


def refused(text: str, folder: Path, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        recipe(text, folder)


def test_a_document_in_a_recipe_may_name_its_sources_and_steps_and_places_beside_it(tmp_path: Path) -> None:
    (tmp_path / "three").mkdir()
    found = recipe(INLINE, tmp_path)
    step = found.steps["both"]
    assert step.inputs == {"models": ("one", "tuned", "three")}
    assert step.options == {
        "config": {
            "merge_method": "ties",
            "base_model": "one",
            "models": [{"model": "tuned"}, {"model": "three"}],
            "parameters": {"weight": 0.5},
        },
        "seed": 7,
    }
    assert found.sources["three"] == Location(str(tmp_path / "three"))
    assert found.order() == ["tuned", "both"]


def test_mergekits_own_names_do_too(tmp_path: Path) -> None:
    text = INLINE.replace("method:", "merge_method:").replace("base: one", "base_model: one")
    text = text.replace("[tuned, ./three]", "[{model: tuned}]")
    assert recipe(text, tmp_path).steps["both"].options["config"]["models"] == [{"model": "tuned"}]


def test_a_merge_file_in_a_recipe_counts_from_the_recipes_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "sub"):
        (tmp_path / name).mkdir()
    (tmp_path / "sub/m.yml").write_text(f"name: first\n{merge_of('./a', './b')}---\n{merge_of('first', './a', 'raw')}")
    text = "sources: {raw: /far/raw}\ntensors: {made: {merge: {config: sub/m.yml, allow_nonfinite: true}}}\n"
    text += "outputs: {out: {from: made}}\n"
    found = recipe(text, tmp_path)
    places = {"raw": "/far/raw", "a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    assert {name: place.path for name, place in found.sources.items()} == places
    assert found.order() == ["first", "made"]
    assert found.steps["made"].inputs == {"models": ("first", "a", "raw")}
    assert [step.options["allow_nonfinite"] for step in found.steps.values()] == [True, True]


def test_what_is_called_as_a_source_is_that_source_and_a_folder_of_its_name_is_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    found = recipe(INLINE.replace("one: ./one", "one: /far/one").replace("[tuned, ./three]", "[tuned, two]"), tmp_path)
    assert found.sources["one"] == Location("/far/one")
    assert set(found.sources) == {"one", "two", "lora"}


def test_two_merges_do_not_take_each_others_models(tmp_path: Path) -> None:
    for name in ("x/a", "y/a", "lora"):
        (tmp_path / name).mkdir(parents=True)
    text = "sources: {c: ./c}\ntensors:\n"
    for name, models in (("one", "./x/a+./lora, c"), ("two", "./y/a, ./x/a+./lora"), ("all", "one, two, ./c")):
        text += f"  {name}: {{merge: {{method: linear, models: [{models}], parameters: {{weight: 1}}}}}}\n"
    found = recipe(f"{text}outputs: {{out: {{from: all}}}}\n", tmp_path)
    places = {"c": "c", "a": "x/a", "lora": "lora", "a-2": "y/a"}
    assert found.sources == {name: Location(str(tmp_path / place)) for name, place in places.items()}
    assert found.steps["one"].inputs == {"models": ("a+lora", "c")}
    assert found.steps["two"].inputs == {"models": ("a-2", "a+lora")}
    assert found.steps["all"].inputs == {"models": ("one", "two", "c")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: ties", "method: sleep", "r.yaml:6: tensors.both.merge.merge_method: there is no method sleep"),
        (
            "method: ties",
            "merge_method: ties\n      method: linear",
            "r.yaml:7: tensors.both.merge.method: is merge_method",
        ),
        (
            "base: one",
            "base: one\n      base_model: tuned",
            "r.yaml:7: tensors.both.merge.base: is base_model once more",
        ),
        ("base: one\n", "base: 3\n", "r.yaml:7: tensors.both.merge.base_model: expected text, found 3"),
        ("weight: 0.5", "wieght: 0.5", "r.yaml:9: tensors.both.merge.parameters.wieght: unknown parameter"),
        (
            "weight: 0.5",
            "weight: much",
            "r.yaml:9: tensors.both.merge.parameters.weight: expected a number, found 'much'",
        ),
        ("seed: 7", "seed: much", "r.yaml:10: tensors.both.merge.seed: "),
        ("seed: 7", "plugin: x.py", "r.yaml:10: tensors.both.merge.plugin: unknown field"),
        ("seed: 7", "config: m.yml", "r.yaml:6: tensors.both.merge.method: has no place beside config"),
        ("[tuned, ./three]", "3", "r.yaml:8: tensors.both.merge.models: expected a list, found 3"),
        ("[tuned, ./three]", "[tuned, 3]", "r.yaml:8: tensors.both.merge.models.1: expected a mapping, found 3"),
    ],
)
def test_what_makes_no_sense_is_told_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    refused(INLINE.replace(old, new), tmp_path, message)


def test_a_merge_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    text = "sources: {a: ./a}\ntensors: {made: {merge: {config: m.yml}}}\noutputs: {out: {from: made}}\n"
    with pytest.raises(SourceMissing, match=r"m\.yml: no such file"):
        recipe(text, tmp_path)
    (tmp_path / "m.yml").write_bytes(b"\xff\xfe")
    refused(text, tmp_path, "m.yml: cannot be read")
    refused(text.replace("m.yml", "3"), tmp_path, "made.merge.config: expected text")


def test_what_is_wrong_in_a_merge_file_is_told_with_its_own_name_and_line(tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text(merge_of("./a", "./b").replace("weight: 1", "wieght: 1"))
    text = "sources: {a: ./a}\ntensors: {made: {merge: {config: m.yml}}}\noutputs: {out: {from: made}}\n"
    refused(text, tmp_path, f"{tmp_path}/m.yml:2: parameters.wieght: unknown parameter")
