"""`weightops merge` from argv to the folder: a merge file or options, what is shown and proven, plugins, seeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import yaml
from merge_command import LAYERS, Say, state, written
from naive_merging import naively
from safetensors.torch import load_file, save_file
from support import digests, same_bits, to_bytes

import weightops
from weightops.api.merging import Models
from weightops.cli.commands.merge import PARAMETERS
from weightops.errors import UsageError
from weightops.operations.merge import MergePlan, MergeProof
from weightops.ops.merging.methods import METHODS

UP = "model.layers.1.mlp.up_proj.weight"


def ties(**more: Any) -> dict[str, Any]:
    models = [{"model": "./a", "parameters": {"weight": 0.6}}, {"model": "./b", "parameters": {"weight": 0.4}}]
    return {"merge_method": "ties", "base_model": "./base", "models": models, "parameters": {"density": 0.5}, **more}


TIES = "merge ./a ./b --method ties --base ./base --density 0.5 --weight 0.6 --weight 0.4"


def test_a_merge_file_is_merged_and_lies_beside_the_result_as_it_was_written(say: Say) -> None:
    text = f"# mine\n{yaml.safe_dump(ties())}"
    Path("m.yml").write_text(text)
    assert say("merge m.yml --out out")[0] == 0
    models = [state(name) for name in ("a", "b", "base")]
    own = [{"weight": 0.6, "density": 0.5}, {"weight": 0.4, "density": 0.5}, {}]
    expected = {name: naively("ties", [m[name] for m in models], 2, None, own, name=name) for name in models[0]}
    assert same_bits(state("out"), expected)
    assert Path("out/mergekit_config.yml").read_text() == text
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_hidden_layers"], config["torch_dtype"]) == (LAYERS, "float32")
    recipe = json.loads(Path("out/weightops-manifest.json").read_text())["recipe"]
    assert recipe["tensors"]["result"]["merge"]["config"]["models"][0] == {"model": "a", "parameters": {"weight": 0.6}}


EVERYDAY: list[tuple[str, dict[str, Any]]] = [
    (TIES, ties()),
    (
        "merge ./a ./b --method linear --weight 1 --weight 0.5 --normalize false --out-dtype bfloat16",
        {
            "merge_method": "linear",
            "models": [{"model": "./a", "parameters": {"weight": 1}}, {"model": "./b", "parameters": {"weight": 0.5}}],
            "parameters": {"normalize": False},
            "out_dtype": "bfloat16",
        },
    ),
    (
        "merge ./a ./b --method slerp --base ./a --t 0,0.5,1 --dtype float16",
        {
            "merge_method": "slerp",
            "base_model": "./a",
            "models": [{"model": "./a"}, {"model": "./b"}],
            "parameters": {"t": [0, 0.5, 1]},
            "dtype": "float16",
        },
    ),
    (
        "merge ./a ./b --method dare_ties --base ./base --density 0.3 --weight 1 --lambda 1.1 --rescale false --seed 5",
        {
            "merge_method": "dare_ties",
            "base_model": "./base",
            "models": [{"model": "./a"}, {"model": "./b"}],
            "parameters": {"density": 0.3, "weight": 1, "lambda": 1.1, "rescale": False},
        },
    ),
    (
        "merge ./a ./b --method model_stock --base ./base --filter-wise true",
        {
            "merge_method": "model_stock",
            "base_model": "./base",
            "models": [{"model": "./a"}, {"model": "./b"}],
            "parameters": {"filter_wise": True},
        },
    ),
    (
        "merge ./a --method passthrough --scale 2",
        {"merge_method": "passthrough", "models": [{"model": "./a"}], "parameters": {"scale": 2}},
    ),
]


@pytest.mark.parametrize(("line", "document"), EVERYDAY, ids=[line.split("--method ")[1] for line, _ in EVERYDAY])
def test_options_say_what_a_merge_file_says(say: Say, line: str, document: dict[str, Any]) -> None:
    assert say(f"{line} --out one")[0] == 0
    seed = " --seed 5" if "--seed" in line else ""
    assert say(f"merge {written('m.yml', document)} --out two{seed}")[0] == 0
    assert same_bits(state("one"), state("two"))
    assert json.loads(Path("one/config.json").read_text()) == json.loads(Path("two/config.json").read_text())
    # and the file that is written for them can be merged again
    assert say(f"merge one/mergekit_config.yml --verify one{seed}")[0] == 0


def test_there_is_an_option_for_every_parameter() -> None:
    assert set(PARAMETERS) == {name for method in METHODS.values() for name in method.parameters}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("merge ./a ./b --out o", "there is no method to merge by"),
        ("merge ./a ./b --method linear --out o", "linear needs weight"),
        (
            "merge ./a ./b --method linear --weight 1 --weight 2 --weight 3 --out o",
            "--weight is given 3 times for 2 models",
        ),
        ("merge ./a ./b --method linear --weight much --out o", "--weight: cannot read much"),
        ("merge ./a ./b --method linear --weight 1 --normalize 0.5 --out o", "expected true or false"),
        ("merge ./a ./b --method slerp --base ./a --t nan --out o", "expected a finite number"),
        ("merge ./a ./b --method slerp --t 0.5 --out o", "base_model"),
        ("merge ./a ./b --method sleep --out o", "slerp"),
        ("merge ./a ./c --method linear --weight 1 --out o", "c: no such file or folder"),
        (f"{TIES} --density 2 --out o", "density is 2, expected a share from 0 to 1"),
        (TIES, "expected one of --out, --explain and --verify"),
        (f"{TIES} --out o --explain", "expected one of --out, --explain and --verify"),
        (f"{TIES} --explain --overwrite", "with --explain"),
        (f"{TIES} --verify ./a --dry-run", "with --verify"),
        ("merge m.yml --t 0.5 --out o", "--t has no use with a merge file, which says all"),
        ("merge m.yml --method linear --out o", "method has no use beside a merge file"),
        ("merge none.yml --out o", "none.yml: no such file"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(say: Say, line: str, problem: str) -> None:
    written("m.yml", ties())
    code, out, err = say(line)
    assert code == (10 if "no such file" in problem else 2), err
    assert problem in err
    assert "Traceback" not in err
    assert (out, Path("o").exists()) == ("", False)


def test_a_dry_run_writes_nothing(say: Say) -> None:
    before = sorted(Path().rglob("*"))
    assert say(f"{TIES} --out out --dry-run --json")[0] == 0
    assert sorted(Path().rglob("*")) == before


def test_explain_shows_how_each_tensor_is_made(say: Say) -> None:
    document = ties()
    document["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]
    code, out, _ = say(f"merge {written('m.yml', document)} --explain")
    assert code == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()}
    assert len(lines) == 1 + len(state("a"))
    inputs = "a [weight 0.5, density 0.5], b [weight 0.4, density 0.5], base (base)"
    assert lines[UP] == f"ties {inputs} normalize true, rescale false, lambda 1"
    assert "a [weight 0.25, density 0.5]" in lines["lm_head.weight"]


def test_explain_as_json_names_what_each_tensor_is_made_of(say: Say) -> None:
    document = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "./a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "./b", "layer_range": [1, 3], "parameters": {"scale": 0.5}}]},
        ],
    }
    code, out, _ = say(f"merge {written('m.yml', document)} --explain --json")
    assert code == 0
    plan = json.loads(out)
    assert len(msgspec.convert(plan, MergePlan).tensors) == len(plan["tensors"])
    made = {each["tensor"]: each for each in plan["tensors"]}
    name = "model.layers.3.mlp.up_proj.weight"
    assert made[name] == {
        "tensor": name,
        "method": "passthrough",
        "inputs": [
            {
                "model": "b",
                "tensor": "model.layers.2.mlp.up_proj.weight",
                "is_base": False,
                "parameters": {"scale": 0.5},
            }
        ],
        "parameters": {},
    }
    assert made["model.layers.0.mlp.up_proj.weight"]["method"] == "copy"
    assert not list(Path().glob("out*"))


def changed(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (path,) = Path(name).glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_verify_says_whether_a_folder_is_what_the_merge_makes(say: Say) -> None:
    assert say(f"{TIES} --out out")[0] == 0
    before = digests(Path())
    code, out, _ = say(f"{TIES} --verify out")
    assert (code, out) == (0, f"out: is what this merge makes ({len(state('a'))} tensors)\n")
    assert say(f"{TIES} --verify out --quiet")[:2] == (0, "")
    assert digests(Path()) == before
    code, out, _ = say(f"{TIES} --lambda 1.5 --verify out --json")
    proof = json.loads(out)
    assert proof["schema"] == "weightops-merge-proof/1"
    assert not msgspec.convert(proof, MergeProof).is_same
    assert (code, proof["is_same"], len(proof["differ"]), proof["files"]) == (3, False, len(state("a")), [])


def test_one_byte_changed_is_named(say: Say) -> None:
    assert say(f"{TIES} --out out")[0] == 0
    data = bytearray(Path("out/model.safetensors").read_bytes())
    data[-1] ^= 1
    Path("out/model.safetensors").write_bytes(data)
    code, out, _ = say(f"{TIES} --verify out")
    assert (code, len(out.splitlines())) == (3, 2)
    name = out.split()[1]
    assert out.startswith(f"tensor {name} differs\nout: is NOT what this merge makes")
    assert to_bytes(state("out")[name])[-1:] == bytes(data[-1:])


def test_what_is_missing_too_many_or_of_another_shape_is_named(say: Say) -> None:
    assert say(f"{TIES} --out out")[0] == 0

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors |= {"more": torch.zeros(1), UP: torch.zeros(2)}

    changed("out", edit)
    config = json.loads(Path("out/config.json").read_text())
    Path("out/config.json").write_text(json.dumps(config | {"hidden_size": 5}))
    code, out, _ = say(f"{TIES} --verify out --json")
    proof = json.loads(out)
    assert code == 3
    assert {key: proof[key] for key in ("missing", "extra", "differ", "files")} == {
        "missing": ["lm_head.weight"],
        "extra": ["more"],
        "differ": [UP],
        "files": ["config.json"],
    }
    lines = say(f"{TIES} --verify out")[1].splitlines()
    assert lines[:2] == [f"tensor {UP} differs", "tensor lm_head.weight is missing"]
    assert lines[2:4] == ["tensor more is not of this merge", "config.json differs"]


DARE = "merge ./a ./b --method dare_linear --base ./base --density 0.5 --weight 1"


def test_a_seed_draws_masks_that_every_run_draws_and_is_recorded(say: Say) -> None:
    for name, seed in (("one", ""), ("two", "--seed 0"), ("three", "--seed 1")):
        assert say(f"{DARE} --out {name} {seed}")[0] == 0
    assert same_bits(state("one"), state("two"))
    assert not same_bits(state("one"), state("three"))
    recipe = json.loads(Path("three/weightops-manifest.json").read_text())["recipe"]
    assert recipe["tensors"]["result"]["merge"]["seed"] == 1
    assert [say(f"{DARE} --verify three --quiet {seed}")[0] for seed in ("", "--seed 1")] == [3, 0]


def test_masks_do_not_depend_on_where_models_lie(say: Say) -> None:
    assert say(f"{DARE} --out one")[0] == 0
    shutil.copytree("a", "elsewhere/other", symlinks=False)
    assert say(f"{DARE.replace('./a', './elsewhere/other')} --out two")[0] == 0
    assert same_bits(state("one"), state("two"))


@pytest.mark.parametrize("line", [TIES, DARE], ids=["ties", "dare_linear"])
def test_workers_and_shards_change_no_tensor(say: Say, line: str) -> None:
    options = ("--workers 1", "--workers 3", "--max-shard-size 200", "--format torch --workers 3")
    for i, option in enumerate(options):
        assert say(f"{line} --out out{i} {option}")[0] == 0
    assert len(list(Path("out2").glob("*.safetensors"))) > 3
    for name in ("out1", "out2"):
        assert same_bits(state(name), state("out0"))
    (path,) = Path("out3").glob("*.bin")
    assert same_bits(torch.load(path, weights_only=True), state("out0"))


def test_numbers_that_are_none_are_refused_and_nothing_is_left_or_merged_if_they_may_be(say: Say) -> None:
    shutil.copytree("b", "odd", symlinks=False)
    changed("odd", lambda tensors: tensors[UP].__setitem__((1, 2), float("nan")))
    line = "merge ./a ./odd --method linear --weight 0.5 --out out"
    code, _, err = say(line)
    assert code == 1
    assert f"{UP}: 1 of 16 elements of a block of odd are NaN or infinite" in err
    assert not Path("out").exists()
    assert say(f"{line} --allow-nonfinite")[0] == 0
    assert state("out")[UP].isnan().nonzero().tolist() == [[1, 2]]


def test_stages_and_adapters_are_made_in_one_run_as_one_after_the_other(say: Say) -> None:
    module = "base_model.model.model.layers.1.mlp.up_proj"
    random = torch.Generator().manual_seed(0)
    factors = {"lora_A": (2, 4), "lora_B": (4, 2)}
    adapter = {f"{module}.{name}.weight": torch.randn(size, generator=random) for name, size in factors.items()}
    Path("lora").mkdir()
    save_file(adapter, "lora/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    Path("lora/adapter_config.json").write_text(json.dumps(settings))
    first = {"merge_method": "linear", "models": [{"model": "./a"}, {"model": "./b"}], "parameters": {"weight": 0.5}}
    last = ties(models=[{"model": "first"}, {"model": "./a+./lora"}], parameters={"weight": 0.5})
    Path("m.yml").write_text(yaml.safe_dump_all([{"name": "first", **first}, last]))
    assert say("merge m.yml --out out")[0] == 0
    assert Path("out/mergekit_config.yml").read_text() == Path("m.yml").read_text()
    assert say(f"merge {written('first.yml', first)} --out first")[0] == 0
    assert say("merge-lora --base a --adapter lora --out tuned")[0] == 0
    assert not torch.equal(state("tuned")[UP], state("a")[UP])
    last["models"] = [{"model": "./first"}, {"model": "./tuned"}]
    assert say(f"merge {written('last.yml', last)} --out expected")[0] == 0
    assert same_bits(state("out"), state("expected"))
    Path("r.yaml").write_text("sources: {}\ntensors: {made: {merge: {config: m.yml}}}\noutputs: {two: {from: made}}\n")
    code, _, err = say("run r.yaml")
    assert code == 0, err
    assert same_bits(state("two"), state("expected"))


# ---- from Python


def test_the_same_from_python(say: Say) -> None:
    assert say(f"{TIES} --out one")[0] == 0
    models: Models = [
        {"model": "a", "parameters": {"weight": 0.6}},
        {"model": Path("b"), "parameters": {"weight": 0.4}},
    ]
    how: Any = {"method": "ties", "base": Path("base"), "parameters": {"density": 0.5}}
    weightops.merge(models, "two", **how)
    assert same_bits(state("one"), state("two"))
    assert weightops.verify_merge(models, "one", **how).is_same
    plan = weightops.explain_merge(models, **how)
    assert {made.tensor for made in plan.tensors} == set(state("a"))
    weightops.merge(written("m.yml", ties()), "three")
    assert same_bits(state("one"), state("three"))


def test_values_from_python_that_no_file_could_hold_are_refused(say: Say) -> None:
    with pytest.raises(UsageError, match="weight: expected a number, found tensor"):
        weightops.merge(["a", "b"], "out", method="linear", parameters={"weight": torch.ones(1)})
