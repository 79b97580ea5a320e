"""mergekit's language: what is read, what is refused and in which words, and that a stage is data again."""

from __future__ import annotations

import json

import pytest
from merging import PUBLISHED, stage

from weightops.errors import UsageError
from weightops.io.yaml_document import Document, read_documents
from weightops.operations.merge import Reference, parse_stages
from weightops.operations.merge.document import parse_stage
from weightops.operations.merge.references import References, reference
from weightops.operations.merge.settings import Rule
from weightops.spec import DType

TIES = """\
merge_method: ties
base_model: ./base
models:
  - model: ./a
    parameters:
      weight: 1
      density: 0.5
  - model: ./b
    parameters: {weight: 0.5, density: 0.5}
parameters:
  normalize: true
dtype: bfloat16
"""
SLICES = """\
merge_method: slerp
base_model: ./a
slices:
  - sources:
      - {model: ./a, layer_range: [0, 2]}
      - {model: ./b, layer_range: [0, 2]}
parameters: {t: 0.5}
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_and_are_the_same_as_data(name: str) -> None:
    for found in parse_stages(PUBLISHED[name].read_text(), name, lambda path: False):
        names = {each: f"model-{i}" for i, each in enumerate(found.references)}
        plain = json.loads(json.dumps(found.plain(names)))
        again = parse_stage(Document(plain, name), References(lambda path: True))
        assert again.plain({each: each.model for each in again.references}) == plain
        assert [each.model for each in again.references] == list(names.values())
        assert (again.dtype, again.methods, again.donor.model) == (found.dtype, found.methods, names[found.donor])


def test_what_is_known_and_not_used_is_listed() -> None:
    unused = {
        name: parse_stages(path.read_text(), name, lambda path: False)[-1].unused for name, path in PUBLISHED.items()
    }
    assert {name: fields for name, fields in unused.items() if fields} == {
        "ties": ("parameters.int8_mask",),
        "dare-ties-anchors": ("common (holds an anchor)", "parameters.int8_mask"),
        "task-arithmetic": ("name", "models.0.parameters.density"),
    }
    text = SLICES.replace("  - sources", "  - residual_weight: 0.5\n    sources").replace(
        "{t: 0.5}", "{t: 1, density: 0}"
    )
    assert stage(text).unused == ("slices.0.residual_weight", "parameters.density")
    assert stage(TIES.replace("- model: ./b", "- model: ./base")).unused == ("models.1.parameters",)


def test_values_have_the_types_that_the_method_wants() -> None:
    text = TIES.replace("weight: 1\n", "weight: '1e-1'\n").replace("density: 0.5\n", "density: [1, {value: 2}]\n")
    with pytest.raises(UsageError, match=r"m\.yml:7: models\.0\.parameters\.density\.0: expected a rule .*, found 1"):
        stage(text)
    text = text.replace("[1, {value: 2}]", "[{filter: mlp, value: [0, 1e-1]}, {filter: '*', value: 1}]")
    source = stage(text.replace("normalize: true", "normalize: 'False'")).modules[0].slices[0].sources[0]
    assert source.parameters == {"weight": (Rule(0.1),), "density": (Rule((0.0, 0.1), "mlp"), Rule(1.0))}
    assert stage(text.replace("true", "'False'")).modules[0].levels[1] == {"normalize": (Rule(False),)}
    assert stage(TIES).dtype is DType.BF16
    assert stage(TIES.replace("bfloat16", "torch.float16")).dtype is DType.F16


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("ties\n", "dare-ties\n", r"m\.yml:1: merge_method: there is no method dare-ties", "is dare_ties meant"),
        ("ties\n", "[ties]\n", r"m\.yml:1: merge_method: expected text, found a list", None),
        ("merge_method: ties\n", "", "m.yml:1: lacks merge_method", None),
        ("dtype: bf", "wieghts: 3\ndtype: bf", r"m\.yml:12: wieghts: unknown field", "is weight meant"),
        ("dtype: bf", "normalize: true\ndtype: bf", r"m\.yml:12: normalize: unknown", "write it under parameters:"),
        ("dtype: bf", "layer_range: [0, 1]\ndtype: bf", r"layer_range: unknown", "beside the model of a source"),
        ("dtype: bf", "gate_mode: hidden\ndtype: bf", r"gate_mode: is of mergekit-moe", None),
        ("  - model: ./b\n", "  - model: ./b\n    weight: 1\n", r":9: models\.1\.weight: unknown", "under parameters:"),
        ("  - model: ./b\n", "  - modle: ./b\n", r":8: models\.1\.modle: unknown field", "is model meant"),
        ("  - model: ./b\n", "  - model: [./b]\n", r":8: models\.1\.model: expected text, found a list", None),
        ("  - model: ./a\n    p", "  - p", r":4: models\.0: lacks model", None),
        ("weight: 1\n", "wieght: 1\n", r":6: models\.0\.parameters\.wieght: unknown parameter", "is weight meant"),
        ("weight: 1\n", "dtype: float16\n", r":6: .*dtype: unknown parameter", "it belongs at the top of the file"),
        ("  - model: ./b\n", "  - model: ./b\n    revision: v2\n", r":9: .*revision: unknown", "model: NAME@REVISION"),
        ("weight: 1\n", "normalize: true\n", r":6: .*normalize is one value for all", "at the top of the file"),
        ("weight: 1\n", "weight: .nan\n", r":6: .*weight: expected a finite number, found nan", None),
        ("weight: 1\n", "weight: [1, -.inf]\n", r":6: .*weight\.1: expected a finite number, found -inf", None),
        ("weight: 1\n", f"weight: 1{'0' * 400}\n", r":6: .*weight: expected a number", None),
        ("weight: 1\n", "weight: heavy\n", r":6: .*weight: expected a number, found 'heavy'", None),
        ("weight: 1\n", "weight: true\n", r":6: .*weight: expected a number, found a truth value", None),
        ("weight: 1\n", "weight: [[1, 2], 3]\n", r":6: .*weight\.0: expected a number, found a list", None),
        ("weight: 1\n", "weight:\n", r":6: .*weight: expected a number, found nothing", None),
        ("weight: 1\n", "weight: []\n", r":6: .*weight: an empty list is no value", None),
        ("weight: 1\n", "weight: [1]\n", r":6: .*weight: a list of one value says nothing between", "without brackets"),
        ("weight: 1\n", "weight: {filter: mlp}\n", r":6: .*weight: lacks value", None),
        ("weight: 1\n", "weight: {fitler: mlp, value: 1}\n", r":6: .*weight\.fitler: unknown field", None),
        ("weight: 1\n", "weight: {filter: 3, value: 1}\n", r":6: .*weight\.filter: expected text, found 3", None),
        ("normalize: true", "normalize: maybe", r":11: .*normalize: expected true or false, found 'maybe'", None),
        ("normalize: true", "normalize: 2", r":11: .*normalize: expected true or false, found 2", None),
        ("bfloat16", "int64", r":12: dtype: models are not merged in int64", "bfloat16, float32, float64"),
        ("- model: ./b", "- model: ./a", r":8: models\.1\.model: \./a is in this slice already", None),
        ("base_model: ./base\n", "", r":1: merge_method: ties needs a base_model", None),
        ("models:\n", "models: 3\nx:\n", r"x: unknown field", None),
        ("  - model: ./a\n", "  - ./a\n  - model: ./a\n", r":4: models\.0: expected a mapping", "write model: ./a"),
        ("ties\n", "slerp\n", r":3: models: slerp merges 1 model besides base_model, found 2", None),
        ("ties\n", "passthrough\n", r":3: models: passthrough merges 1 model, found 3", None),
        ("ties\n", "!!python/name:os.system ties\n", None, None),
    ],
)
def test_what_cannot_be_meant_is_refused_by_line_and_field(
    old: str, new: str, message: str | None, hint: str | None
) -> None:
    assert old in TIES
    text = TIES.replace(old, new, 1)
    if message is None:  # a tag is no program here: what is tagged is the text that it is
        assert stage(text).methods == ("ties",)
        return
    with pytest.raises(UsageError, match=message) as caught:
        stage(text)
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", layer_range: [0, 2]}\n      - {model: ./b", "}\n      - {model: ./b", r":5: .*0: lacks layer_range"),
        ("./b, layer_range: [0, 2]", "./b, layer_range: [0, 1]", r":6: .*takes 1 layer, and the first .* 2 layers"),
        ("[0, 2]", "[2, 0]", r":5: .*layer_range: goes backwards, from 2 to 0"),
        ("[0, 2]", "[0, 2, 4]", r":5: .*layer_range: expected two numbers of layers"),
        ("[0, 2]", "[0, -2]", r":5: .*layer_range: expected two numbers of layers"),
        ("[0, 2]", "[0, true]", r":5: .*layer_range: expected two numbers of layers"),
        ("[0, 2]", "0-2", r":5: .*layer_range: expected two numbers of layers, .*found '0-2'"),
        ("base_model: ./a", "base_model: ./c", r":4: slices\.0: base_model \./c is not among the sources"),
        ("sources", "source", r":4: slices\.0\.source: unknown field"),
        ("slices:", "models: [{model: ./a}]\nslices:", r":4: slices: expected one of .*, has models and slices"),
        ("parameters: {t: 0.5}", "tokenizer_source: base\ntokenizer: {}", r":7: tokenizer_source: says the same"),
        ("parameters: {t: 0.5}", "tokenizer: {sorce: base}", r":7: tokenizer\.sorce: unknown field"),
        ("parameters: {t: 0.5}", "tokenizer: {pad_to_multiple_of: 0}", r":7: .*expected a whole number, found 0"),
        ("parameters: {t: 0.5}", "tokenizer: {tokens: {x: {force: 1}}}", r":7: .*force: expected true or false"),
        ("parameters: {t: 0.5}", "tokenizer: {tokens: {x: {source: {kind: one}}}}", r":7: .*expected zero or model_t"),
        ("parameters: {t: 0.5}", "chat_template: [a]", r":7: chat_template: expected text"),
        ("parameters: {t: 0.5}", "parameters: [t]", r":7: parameters: expected a mapping, found a list"),
        ("parameters: {t: 0.5}", "parameters: {t: 1, t: 2}", r":7: parameters\.t: is given twice"),
        ("slices:", "slices: {}\nx:", r"x: unknown field"),
    ],
)
def test_so_are_slices_and_tokenizers(old: str, new: str, message: str) -> None:
    assert old in SLICES
    with pytest.raises(UsageError, match=message):
        stage(SLICES.replace(old, new, 1))


def test_a_token_takes_its_row_from_exactly_one_place() -> None:
    both = "{kind: model_token, model: ./a, token: x, token_id: 3}"
    for source in (both, both.replace(", token: x, token_id: 3", ""), both.replace("model: ./a, token: x, ", "")):
        with pytest.raises(UsageError, match="a model_token has a model, and either token or token_id"):
            stage(f"{SLICES}tokenizer: {{tokens: {{y: {{source: {source}}}}}}}\n")
    found = stage(f"{SLICES}tokenizer: {{tokens: {{y: {{source: ./c, force: true}}}}}}\n")
    assert found.tokenizer is not None
    assert found.tokenizer.tokens["y"].model == Reference("./c")
    assert [str(each) for each in found.references] == ["./a", "./b", "./c"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [("base", "base"), ("union", "union"), ("./b", Reference("./b")), ("model:./b", Reference("./b"))],
)
def test_a_tokenizer_is_that_of_all_of_the_base_or_of_a_model(said: str, expected: object) -> None:
    for text in (f"tokenizer_source: {said}\n", f"tokenizer: {{source: '{said}'}}\n"):
        choice = stage(SLICES + text).tokenizer
        assert choice is not None
        assert choice.source == expected


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "a: &a {b: *a}", "a: &a\n  <<: *a\n"])
def test_aliases_that_make_a_document_of_any_size_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="too large or nested too deep, aliases being what they repeat"):
        read_documents(text, "m.yml")


def test_merge_keys_stand_behind_what_is_said_and_the_first_before_others() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {x: 2, z: 2}\nc:\n  <<: [*a, *b]\n  y: 3\n"
    (found,) = read_documents(text, "m.yml")
    assert found.data["c"] == {"y": 3, "x": 1, "z": 2}
    assert found.lines["c", "x"] == 1
    assert {place for place in found.anchored if len(place) == 1} == {("a",), ("b",)}
    with pytest.raises(UsageError, match=r"m\.yml:2: c\.<<: expected a mapping"):
        read_documents("a: &a 3\nc: {<<: *a}", "m.yml")


def test_only_a_field_that_holds_an_anchor_in_use_may_be_there_for_nothing() -> None:
    assert stage(f"half: &half 0.5\n{TIES.replace('weight: 1', 'weight: *half')}").unused == ("half (holds an anchor)",)
    with pytest.raises(UsageError, match=r"m\.yml:1: half: unknown field"):
        stage(f"half: &half 0.5\n{TIES}")


def test_stages_come_after_those_that_they_are_made_of() -> None:
    text = PUBLISHED["stages"].read_text()
    first, second, last = text.split("---\n")
    found = parse_stages("---\n".join([last, second, first]), "m.yml", lambda path: False)
    assert [each.name for each in found] == ["first-half", "second-half", None]
    assert found[2].references == (Reference("first-half"), Reference("second-half"))
    assert found[0].references[0] == Reference("hf://scribes/Scribe-7B")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("second-half", "third"), r"m\.yml:10: name: no other stage uses third"),
        (("name: second-half\n", ""), r"m\.yml:.*: is the second stage without a name"),
        (("name: second-half", "name: first-half"), r"m\.yml:10: name: there is a stage first-half already"),
        (("poets/Poet-7B", "second-half"), r"m\.yml:10: name: is made of itself \(second-half -> second-half\)"),
        (("name: second-half", "name: [x]"), r"m\.yml:10: name: expected text"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(edit: tuple[str, str], message: str) -> None:
    text = PUBLISHED["stages"].read_text().replace(edit[0], edit[1], 1)
    with pytest.raises(UsageError, match=message):
        parse_stages(text, "m.yml", lambda path: False)


@pytest.mark.parametrize("text", ["", "---\n---\n", "# nothing\n"])
def test_an_empty_file_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"m\.yml: is empty"):
        parse_stages(text, "m.yml", lambda path: True)


@pytest.mark.parametrize(
    ("text", "there", "expected"),
    [
        ("./a", {"./a"}, ("./a", None)),
        ("org/name", set(), ("hf://org/name", None)),
        ("org/name", {"org/name"}, ("org/name", None)),
        ("org/name@v2", set(), ("hf://org/name@v2", None)),
        ("org/name@v2", {"org/name@v2"}, ("org/name@v2", None)),
        ("hf://org/name@v2", set(), ("hf://org/name@v2", None)),
        ("./missing/model", set(), ("./missing/model", None)),
        ("./a+./lora", {"./a", "./lora"}, ("./a", "./lora")),
        ("org/name@v2+org/lora@v3", set(), ("hf://org/name@v2", "hf://org/lora@v3")),
        ("a+b", {"a+b"}, ("a+b", None)),
        ("a+b+c", {"a+b"}, ("a+b", "c")),
        ("a+b+c", {"a", "b+c"}, ("a", "b+c")),
    ],
)
def test_what_a_model_is_called(text: str, there: set[str], expected: tuple[str, str | None]) -> None:
    found = reference(text, there.__contains__)
    assert (found.model, found.adapter) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("a+b+c", "expected a model, or a model and one adapter"), ("a@v2", "is here, where there is no revision v2 of")],
)
def test_what_no_model_is_called(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reference(text, {"a"}.__contains__)


def test_a_model_may_be_a_mapping() -> None:
    text = TIES.replace("- model: ./b", "- model: {model: {path: org/b, revision: v2}, lora: ./lora}")
    (found,) = parse_stages(text, "m.yml", lambda path: path.startswith("./"))
    assert found.references[2] == Reference("hf://org/b@v2", "./lora")
    with pytest.raises(UsageError, match=r"m\.yml:8: models\.1\.model\.model\.revison: unknown field"):
        parse_stages(text.replace("revision", "revison"), "m.yml", lambda path: True)
    with pytest.raises(UsageError, match=r"m\.yml:8: models\.1\.model\.model: org/b: is here, where there is no rev"):
        parse_stages(text, "m.yml", lambda path: True)
