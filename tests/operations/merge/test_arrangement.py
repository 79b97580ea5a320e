"""Which tensors are made of which, with which parameters; and which models are refused, in which words."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch
from merging import PUBLISHED, Edit, evaluated, model, stage
from support import evaluate, given_tensor

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError, WeightopsError
from weightops.lazy import LazyTensor
from weightops.operations.merge import Made, Stage, explain, merge, parse_stages
from weightops.operations.merge.arrangement import Job, arrange
from weightops.operations.merge.layers import positions
from weightops.spec import DType

LINEAR = """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.25}}
  - {model: b, parameters: {weight: 0.75}}
"""
FRANKEN = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 4]}]
"""


def arranged(found: Stage, *models: Checkpoint) -> dict[str, Job]:
    return {job.name: job for job in arrange(found, {each.name: each for each in models}).jobs}


def merged(text: str, *models: Checkpoint, **options: bool) -> Checkpoint:
    names = [each.name for each in models]
    config = stage(text).plain({each: each.model for each in stage(text).references})
    return merge(models, config=config, text=text, file="m.yml", names=names, evaluate=evaluated, **options)


# ---- published files


def published(name: str) -> list[dict[str, Job]]:
    """The jobs of each stage, of models that are called as the file calls them."""
    return [
        arranged(found, *(model(each.model) for each in found.references))
        for found in parse_stages(PUBLISHED[name].read_text(), name, lambda path: False)
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_make_every_tensor_of_their_models(name: str) -> None:
    for jobs in published(name):
        layers = {"frankenmerge": 6, "residual-scale": 5}.get(name, 4)
        assert list(jobs) == list(model("any", layers))


def test_a_gradient_goes_over_the_layers_and_has_its_first_value_for_what_is_in_none() -> None:
    (jobs,) = published("slerp")
    t = {name: job.shared["t"] for name, job in jobs.items()}
    assert [t[f"model.layers.{n}.self_attn.q_proj.weight"] for n in (0, 3)] == [0.0, 1.0]
    assert t["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(0.5 + (0.3 - 0.5) / 3)
    assert [t[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 3)] == [1.0, 0.0]
    assert {t["model.embed_tokens.weight"], t["lm_head.weight"], t["model.layers.2.input_layernorm.weight"]} == {0.5}
    assert {job.base for job in jobs.values()} == {0}
    first = published("stages")[2]
    assert [first[name].shared["t"] for name in ("model.embed_tokens.weight", "lm_head.weight")] == [0.2, 0.2]


def test_the_base_has_no_parameters_and_is_last_where_it_is_not_named() -> None:
    (jobs,) = published("ties")
    assert all(job.base == 0 and job.of_each[0] == {} for job in jobs.values())
    assert jobs["lm_head.weight"].of_each[1:] == ({"weight": 0.5, "density": 0.5}, {"weight": 0.3, "density": 0.5})
    (jobs,) = published("model-stock")
    assert all(job.base == 3 and len(job.inputs) == 4 for job in jobs.values())


def test_rules_of_a_source_go_by_the_name_in_its_file_and_shared_ones_by_that_in_the_result() -> None:
    text = FRANKEN.replace("[1, 4]}", "[1, 4], parameters: {scale: [{filter: layers.1., value: 0.5}]}}")
    scales = {name: job.of_each[0]["scale"] for name, job in arranged(stage(text), model("a"), model("b")).items()}
    assert {name for name, scale in scales.items() if scale == 0.5} == {
        f"model.layers.2.{kind}.weight" for kind in ("input_layernorm", "mlp.up_proj", "self_attn.q_proj")
    }
    (jobs,) = published("residual-scale")
    assert {name for name, job in jobs.items() if job.of_each[0]["scale"] is None} >= {"lm_head.weight"}
    assert jobs["model.layers.3.mlp.up_proj.weight"].of_each[0]["scale"] == 1.0


# ---- slices


def test_slices_number_layers_anew_and_take_the_rest_from_the_first_and_the_last() -> None:
    found = merged(FRANKEN, model("a"), b := model("b"))
    assert found["model.layers.4.mlp.up_proj.weight"] == b["model.layers.3.mlp.up_proj.weight"]
    assert found["model.embed_tokens.weight"] == model("a")["model.embed_tokens.weight"]
    assert (found["model.norm.weight"], found["lm_head.weight"]) == (b["model.norm.weight"], b["lm_head.weight"])
    assert found.config()["num_hidden_layers"] == 5


def test_a_layer_that_is_taken_twice_is_another_tensor_of_the_same_bytes() -> None:
    text = FRANKEN.replace("model: b", "model: a")
    found = merged(text, a := model("a"))
    first, again = (found[f"model.layers.{n}.mlp.up_proj.weight"] for n in (1, 2))
    assert first == a["model.layers.1.mlp.up_proj.weight"]
    assert again != first
    assert evaluate(again) == evaluate(first)


def test_a_slice_without_layers_says_what_is_after_them() -> None:
    text = FRANKEN.replace("[0, 2]", "[0, 4]").replace("[1, 4]", "[0, 0]")
    found = merged(text, a := model("a"), b := model("b"))
    assert found["lm_head.weight"] == b["lm_head.weight"]
    assert found["model.layers.3.mlp.up_proj.weight"] == a["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(UsageError, match=r"m\.yml:3: slices\.0: no slice has a layer"):
        merged(text.replace("[0, 4]", "[0, 0]"), model("a"), model("b"))


def test_layers_beyond_a_model_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"m\.yml:4: slices\.1\.sources\.0\.layer_range: ends at 4, and b has 3 layers"
    ):
        merged(FRANKEN, model("a"), model("b", 3))


def test_slices_may_take_layers_of_models_that_have_more_and_fewer() -> None:
    assert merged(FRANKEN, model("a", 2), model("b", 4)).config()["num_hidden_layers"] == 5
    with pytest.raises(IncompatibleInputs, match="num_hidden_layers 2 for a, and 4 for b") as caught:
        merged(LINEAR, model("a", 2), model("b", 4))
    assert "slices" in str(caught.value.hint)


def test_layers_for_further_tokens_come_after_the_others_from_the_last_slice() -> None:
    a, b = (model(name, 4, num_hidden_layers=3, num_nextn_predict_layers=1) for name in "ab")
    found = merged(FRANKEN.replace("[1, 4]", "[1, 3]"), a, b)
    assert found["model.layers.4.mlp.up_proj.weight"] == b["model.layers.3.mlp.up_proj.weight"]
    assert found.config()["num_hidden_layers"] == 4
    assert len(found) == len(model("any", 5))


def test_a_tensor_that_holds_a_part_for_each_layer_is_not_taken_apart() -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens_per_layer.weight"] = torch.ones(6, 8)

    a, b = (model(name, edit=edit) for name in "ab")
    with pytest.raises(UsageError, match=r"model\.embed_tokens_per_layer\.weight of a holds a part for each layer"):
        merged(FRANKEN, a, b)
    assert len(merged(FRANKEN.replace("[1, 4]", "[2, 4]"), a, b)) == len(a)


# ---- towers and modules


def towers(tensors: dict[str, torch.Tensor]) -> None:
    for n in range(2):
        tensors[f"visual.blocks.{n}.attn.qkv.weight"] = torch.randn(3)
        tensors[f"visual.merger.mlp.{2 * n}.weight"] = torch.randn(3)


def test_each_stack_of_layers_counts_for_itself_and_experts_are_none() -> None:
    names = ["model.embed_tokens.weight", "visual.merger.mlp.0.weight", "visual.merger.mlp.1.weight"]
    names += [f"visual.blocks.{n}.attn.qkv.weight" for n in range(2)]
    names += [f"model.layers.{n}.mlp.experts.{e}.up_proj.weight" for n in range(3) for e in range(2)]
    found = positions(names)
    assert found["visual.blocks.1.attn.qkv.weight"] == 1.0
    assert found["model.layers.1.mlp.experts.1.up_proj.weight"] == 0.5
    assert not {name for name in names[:3] if name in found}


def test_what_one_model_alone_has_is_refused_by_name_and_may_be_a_module_of_its_own() -> None:
    a, b = model("a", edit=towers), model("b")
    with pytest.raises(
        IncompatibleInputs, match=r"visual\.blocks\.0\.attn\.qkv\.weight is in a, and not in b \(and so with 3 more\)"
    ) as caught:
        merged(LINEAR, a, b)
    assert "visual: {merge_method: passthrough, models: [{model: a}]}" in str(caught.value.hint)
    body = LINEAR.partition("models:\n")[2].replace("  -", "      -")
    text = f"merge_method: linear\nmodules:\n  text:\n    models:\n{body}"
    text += "  visual: {merge_method: passthrough, models: [{model: a}]}\n"
    found = merged(text, a, b)
    assert found.keys() == a.keys()
    assert found["visual.blocks.1.attn.qkv.weight"] == a["visual.blocks.1.attn.qkv.weight"]
    assert found["lm_head.weight"] != a["lm_head.weight"]
    with pytest.raises(UsageError, match=r"modules\.vision: no tensor's name begins with vision, nor any with text"):
        merged(text.replace("visual:", "vision:"), a, b)


def test_a_tensor_that_no_module_takes_is_refused() -> None:
    text = "merge_method: passthrough\nmodules:\n  visual: {models: [{model: a}]}\n  model: {models: [{model: a}]}\n"
    with pytest.raises(UsageError, match=r"m\.yml:2: modules: no module takes lm_head\.weight of a"):
        merged(text, model("a", edit=towers))


# ---- heads, buffers, what is computed anew


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def test_the_embedding_is_the_head_of_a_model_whose_head_is_tied_to_it() -> None:
    a = model("a", edit=without_head, tie_word_embeddings=True)
    found = merged(LINEAR, a, model("b"))
    expected = 0.25 * a["model.embed_tokens.weight"].torch() + 0.75 * model("b")["lm_head.weight"].torch()
    torch.testing.assert_close(found["lm_head.weight"].torch(), expected)
    assert found.config()["tie_word_embeddings"] is False
    assert any("model.embed_tokens.weight is its lm_head.weight too" in warning for warning in found.warnings)


def test_no_head_is_written_where_none_has_one() -> None:
    a, b = (model(name, edit=without_head, tie_word_embeddings=True) for name in "ab")
    assert "lm_head.weight" not in merged(LINEAR, a, b)
    assert merged(LINEAR, a, b).config()["tie_word_embeddings"] is True


def test_a_model_that_is_not_tied_lacks_its_head() -> None:
    with pytest.raises(IncompatibleInputs, match=r"lm_head\.weight is in b, and not in a"):
        merged(LINEAR, model("a", edit=without_head, tie_word_embeddings=False), model("b"))


def test_integers_are_not_merged_but_have_to_agree() -> None:
    def edit(value: int) -> Edit:
        return lambda tensors: tensors.update({"model.position_ids": torch.tensor([0, value])})

    same = merged(f"{LINEAR}dtype: bfloat16\n", model("a", edit=edit(1)), model("b", edit=edit(1)))
    assert same["model.position_ids"].spec.dtype is DType.I64
    assert same.watch == ()
    other = merged(LINEAR, model("a", edit=edit(1)), model("b", edit=edit(2)))
    with pytest.raises(IncompatibleInputs, match=r"model\.position_ids is to be the same in a and b.*values differ"):
        evaluated(other.watch)
    with pytest.raises(IncompatibleInputs, match=r"model\.position_ids is int64 \[2\] in a, and float32 \[2\] in b"):
        merged(
            LINEAR,
            model("a", edit=edit(1)),
            model("b", edit=lambda t: t.update({"model.position_ids": torch.zeros(2)})),
        )


def test_what_follows_from_the_configuration_is_left_out_if_some_lack_it() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    found = merged(LINEAR, model("a", edit=lambda tensors: tensors.update({name: torch.ones(2)})), model("b"))
    assert name not in found
    assert "follows from the configuration" in found.dropped[name]


def test_biases_are_merged_like_the_rest() -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(4)

    assert "model.layers.0.self_attn.q_proj.bias" in merged(LINEAR, model("a", edit=edit), model("b", edit=edit))


# ---- types


def test_inputs_are_cast_before_and_results_after_merging() -> None:
    a, b = model("a", dtype=torch.bfloat16), model("b", dtype=torch.float16)
    both = merged(LINEAR, a, b)
    assert {tensor.spec.dtype for tensor in both.values()} == {DType.F32}
    text = f"{LINEAR}dtype: float32\nout_dtype: float16\n"
    assert {tensor.spec.dtype for tensor in merged(text, a, b).values()} == {DType.F16}
    expected = (a["lm_head.weight"].torch().float() * 0.25 + b["lm_head.weight"].torch().float() * 0.75).half()
    torch.testing.assert_close(merged(text, a, b)["lm_head.weight"].torch(), expected)


def test_types_without_arithmetic_are_refused_unless_cast() -> None:
    a = model("a", edit=lambda tensors: tensors.update({"lm_head.weight": torch.ones(6, 4).to(torch.float8_e4m3fn)}))
    with pytest.raises(IncompatibleInputs, match=r"lm_head\.weight is float8_e4m3fn in a, float32 in b") as caught:
        merged(LINEAR, a, model("b"))
    assert "dtype: bfloat16" in str(caught.value.hint)
    assert merged(f"{LINEAR}dtype: bfloat16\n", a, model("b"))["lm_head.weight"].spec.dtype is DType.BF16


def test_what_is_passed_through_is_the_very_tensor() -> None:
    found = merged("merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 1.0}}]\n", a := model("a"))
    assert dict(found) == dict(a)


# ---- what does not belong together


@pytest.mark.parametrize(
    ("b", "message", "hint"),
    [
        (model("b", model_type="mistral"), "model_type llama for a, and mistral for b", "one architecture"),
        (model("b", architectures=["LlamaModel"]), "architectures LlamaForCausalLM for a, and LlamaModel for b", ""),
        (model("b", hidden_size=8), "hidden_size 4 for a, and 8 for b", "one architecture and size"),
        (
            model("b", edit=lambda t: t.pop("model.norm.weight")),
            r"model\.norm\.weight is in a, and not in b",
            "in full",
        ),
        (
            model("b", edit=lambda t: t.update({"model.embed_tokens.weight": torch.ones(8, 4)})),
            r"model\.embed_tokens\.weight is \[6, 4\] in a and \[8, 4\] in b",
            "tokenizer: {source: union}",
        ),
        (
            model("b", edit=lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(8, 4)})),
            r"model\.layers\.1\.mlp\.up_proj\.weight is \[4, 4\] in a and \[8, 4\] in b",
            "other sizes",
        ),
        (
            model("b", quantization_config={"quant_method": "awq"}),
            r"b: config\.json says quant_method awq, and every weight is plain",
            "remove what it says",
        ),
        (
            model("b", edit=lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)})),
            r"b: model\.layers\.0\.mlp\.up_proj\.weight_scale is a part of a quantised weight, and .*weight is plain",
            "their scales kept",
        ),
    ],
)
def test_models_that_do_not_belong_together_are_refused(b: Checkpoint, message: str, hint: str) -> None:
    with pytest.raises(IncompatibleInputs, match=message) as caught:
        merged(LINEAR, model("a"), b)
    assert hint in str(caught.value.hint)


def test_an_adapter_alone_is_no_model() -> None:
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": given_tensor(torch.ones(2, 4))}
    adapter = Checkpoint("b", lora, {"adapter_config.json": written_json({"peft_type": "LORA"})})
    with pytest.raises(IncompatibleInputs, match="b is a LoRA adapter alone, not a model") as caught:
        merged(LINEAR, model("a"), adapter)
    assert "base+adapter" in str(caught.value.hint)


def test_settings_that_change_what_weights_mean_are_named() -> None:
    found = merged(LINEAR, model("a", rope_theta=1e4), model("b", rope_theta=5e5))
    said = "config.json says rope_theta 10000.0 for a, and 500000.0 for b: the result has that of a"
    assert said in found.warnings
    said = "config.json says rope_theta 500000.0 for b, and 10000.0 for a: the result has that of b"
    found = merged(f"{LINEAR}base_model: b\n", model("a", rope_theta=1e4), model("b", rope_theta=5e5))
    assert said in found.warnings
    assert found.config()["rope_theta"] == 5e5


def test_a_model_without_config_is_told_by_its_tensors() -> None:
    assert len(merged(LINEAR, replace(model("a"), sidecars={}), model("b"))) == len(model("a"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINEAR.replace("0.25", "{filter: mlp, value: 1}"), r"m\.yml:3: models\.0: linear needs weight, .* of a"),
        (
            LINEAR.replace("linear", "nearswap") + "base_model: a\n",
            r"m\.yml:1: nearswap needs t, .* model\.embed",
        ),
        (
            LINEAR.replace("0.25", "-0.75"),
            r"m\.yml:2: models: the weights -0\.75, 0\.75 add up to 0.*, for model\.embed",
        ),
    ],
)
def test_parameters_that_are_missing_or_cannot_be_meant_are_refused_by_tensor(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merged(text, model("a"), model("b"))


def test_names_and_models_have_to_agree() -> None:
    config = stage(LINEAR).plain({each: each.model for each in stage(LINEAR).references})
    with pytest.raises(UsageError, match=r"merge: models\.1\.model: there is no model b"):
        merge([model("a")], config=config, names=["a"], evaluate=evaluated)
    with pytest.raises(UsageError, match="no field names the model c"):
        merge([model("a"), model("b"), model("c")], config=config, names=["a", "b", "c"], evaluate=evaluated)


def test_a_stage_of_several_has_the_lines_of_its_own_document() -> None:
    text = f"name: x\n{LINEAR}---\nmerge_method: passthrough\nmodels: [{{model: x, parameters: {{scale: a}}}}]\n"
    config = {"merge_method": "passthrough", "models": [{"model": "x", "parameters": {"scale": "a"}}]}
    with pytest.raises(WeightopsError, match=r"m\.yml:8: models\.0\.parameters\.scale: expected a number"):
        merge([model("x")], config=config, text=text, file="m.yml", names=["x"], evaluate=evaluated)


# ---- explained


def explained(text: str, *models: Checkpoint) -> dict[str, Made]:
    names = [each.name for each in models]
    config = stage(text).plain({each: each.model for each in stage(text).references})
    return {row.tensor: row for row in explain(models, config=config, names=names, evaluate=evaluated).tensors}


def test_every_tensor_is_explained_by_values_that_print() -> None:
    rows = explained(f"{LINEAR}parameters: {{normalize: false}}\n", model("a"), model("b"))
    assert rows.keys() == model("a").keys()
    assert msgspec.to_builtins(rows["model.norm.weight"]) == {
        "tensor": "model.norm.weight",
        "method": "linear",
        "inputs": (
            {"model": "a", "tensor": "model.norm.weight", "is_base": False, "parameters": {"weight": 0.25}},
            {"model": "b", "tensor": "model.norm.weight", "is_base": False, "parameters": {"weight": 0.75}},
        ),
        "parameters": {"normalize": False},
    }
    rows = explained(FRANKEN, model("a"), model("b"))
    assert {row.method for row in rows.values()} == {"copy"}


def test_equal_files_make_equal_tensors_whatever_the_order_of_names() -> None:
    def made(*models: Checkpoint) -> dict[str, LazyTensor]:
        return dict(merged(LINEAR, *models))

    assert made(model("a"), model("b")) == made(model("b"), model("a"))
