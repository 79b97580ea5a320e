"""Edits of models: from files, recipes and Python; what they make answers as transformers says it should."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from families import COMMON, FAMILIES
from mtp_models import save_with_mtp
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny
from transformers import AutoModelForCausalLM

import weightops
from weightops.cli.main import cli
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError

IDS = torch.tensor([[3, 5, 9, 17, 33]])
AS_LLAMA: list[dict[str, Any]] = [
    {
        "select": r"(?P<p>model\.layers\.\d+\.self_attn)\.qkv_proj\.weight",
        "split": {"heads": ["q", "k", "v"]},
        "name": ["{p}.q_proj.weight", "{p}.k_proj.weight", "{p}.v_proj.weight"],
    },
    {
        "select": r"(?P<p>model\.layers\.\d+\.mlp)\.gate_up_proj\.weight",
        "split": {"parts": 2},
        "name": ["{p}.gate_proj.weight", "{p}.up_proj.weight"],
    },
]
LLAMA = {"set": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}}


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    tiny(kind, **{**COMMON, **FAMILIES.get(kind, {}), **changes}).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def written(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_one_file_makes_phi_a_llama(tmp_path: Path) -> None:
    source = saved("phi3", tmp_path / "phi")
    file = written(tmp_path / "steps.yml", {"edit": {"source": "./phi", "steps": AS_LLAMA, "config": LLAMA}})
    result = CliRunner().invoke(cli, ["edit", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_a_dry_run_says_what_each_step_does(tmp_path: Path) -> None:
    saved("phi3", tmp_path / "phi")
    file = written(tmp_path / "steps.yml", {"edit": {"source": "./phi", "steps": AS_LLAMA, "config": LLAMA}})
    result = CliRunner().invoke(cli, ["edit", str(file), "--out", str(tmp_path / "out"), "--dry-run"])
    assert "2. split: model.layers.0.mlp.gate_up_proj.weight float32 [192, 64] becomes" in result.output
    assert "model.layers.0.mlp.up_proj.weight float32 [96, 64]; in all 4 become 8" in result.output
    assert not (tmp_path / "out").exists()


def test_a_recipe_and_python_give_the_same(tmp_path: Path) -> None:
    source = saved("phi3", tmp_path / "phi")
    weightops.edit(source, tmp_path / "one", steps=AS_LLAMA, **LLAMA)
    document = {
        "sources": {"phi": str(source)},
        "tensors": {"llama": {"edit": {"source": "phi", "steps": AS_LLAMA, "config": LLAMA}}},
        "outputs": {str(tmp_path / "two"): {"from": "llama"}},
    }
    weightops.run(document)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_way_back_is_the_same_file(tmp_path: Path) -> None:
    source = saved("phi3", tmp_path / "phi")
    weightops.edit(source, tmp_path / "llama", steps=AS_LLAMA, **LLAMA)
    back = [
        {
            "select": r"(?P<p>model\.layers\.\d+\.self_attn)\.(?P<x>[qkv])_proj\.weight",
            "concat": {"by": "x", "order": ["q", "k", "v"]},
            "name": "{p}.qkv_proj.weight",
        },
        {
            "select": r"(?P<p>model\.layers\.\d+\.mlp)\.(?P<x>gate|up)_proj\.weight",
            "concat": {"by": "x", "order": ["gate", "up"]},
            "name": "{p}.gate_up_proj.weight",
        },
    ]
    phi = {"set": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}}
    weightops.edit(tmp_path / "llama", tmp_path / "out", steps=back, **phi)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_heads_pooled_in_groups_and_repeated_again(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model", num_key_value_heads=4)
    pooled = [
        {"select": r"(?P<p>.*\.[kv]_proj)\.weight", "view": ["heads", "head_dim", "hidden"], "name": "{0}"},
        {"select": r"(?P<p>.*\.[kv]_proj)\.weight", "view": [2, 2, -1]},
        {"select": r"(?P<p>.*\.[kv]_proj)\.weight", "take": {"axis": 1, "list": [0]}, "name": "{0}.0", "keep": True},
        {"select": r"(?P<p>.*\.[kv]_proj)\.weight", "take": {"axis": 1, "list": [1]}},
        {
            "select": r"(?P<p>.*\.[kv]_proj)\.weight",
            "combine": {"weight": 0.5, "with": [{"tensor": "{0}.0", "weight": 0.5}]},
        },
        {"select": r".*\.weight\.0", "drop": True},
        {"select": r"(?P<p>.*\.[kv]_proj)\.weight", "view": [32, "hidden"]},
    ]
    weightops.edit(source, tmp_path / "out", steps=pooled, set={"num_key_value_heads": 2})
    logits(tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(after[name], before[name].view(2, 2, 16, 64).mean(1).reshape(32, 64))
    repeated = [
        {"select": r"(?P<p>.*\.[kv]_proj)\.weight", "take": {"unit": "head_dim", "list": [0, 0, 1, 1]}},
    ]
    weightops.edit(tmp_path / "out", tmp_path / "again", steps=repeated, set={"num_key_value_heads": 4})
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "out"))


class TestFold:
    NORMS = r".*(input_layernorm|post_attention_layernorm)\.weight|model\.norm\.weight"

    @pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma", "phi3"])
    def test_a_folded_model_answers_alike(self, kind: str, tmp_path: Path) -> None:
        source = saved(kind, tmp_path / "model", tie_word_embeddings=False)
        weightops.edit(source, tmp_path / "out", steps=[{"select": self.NORMS, "fold": True}])
        before = logits(source)
        torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=0, atol=2e-6 * float(before.abs().max()))
        left = 0.0 if kind == "gemma" else 1.0
        folded = load_file(tmp_path / "out" / "model.safetensors")
        assert all(bool((t == left).all()) for n, t in folded.items() if n.endswith("layernorm.weight"))

    def test_a_tied_head_is_refused(self, tmp_path: Path) -> None:
        source = saved("llama", tmp_path / "model", tie_word_embeddings=True)
        with pytest.raises(UsageError, match="the head is the embedding") as raised:
            weightops.edit(source, tmp_path / "out", steps=[{"select": r"model\.norm\.weight", "fold": True}])
        assert "--untie" in str(raised.value.hint)

    def test_a_norm_behind_attention_is_refused(self, tmp_path: Path) -> None:
        source = saved("gemma2", tmp_path / "model")
        with pytest.raises(UsageError, match="follows attention"):
            weightops.edit(
                source, tmp_path / "out", steps=[{"select": r".*post_attention_layernorm\.weight", "fold": True}]
            )

    def test_a_norm_with_a_bias_is_refused(self, tmp_path: Path) -> None:
        source = saved("phi", tmp_path / "model")
        with pytest.raises(UsageError, match="no RMS norm"):
            weightops.edit(source, tmp_path / "out", steps=[{"select": r".*input_layernorm\.weight", "fold": True}])

    @pytest.mark.parametrize(
        ("kind", "norm", "message"),
        [
            ("cohere", "input_layernorm", "blocks are parallel"),
            ("gpt_oss", "post_attention_layernorm", r"whether model\.layers\.0\.mlp\.experts\.down_proj reads it"),
            ("llama4_text", "post_attention_layernorm", r"feed_forward\.experts\.\w+ reads it is not known"),
            ("minimax", "input_layernorm", "part of the residual"),
            ("gemma3n_text", "input_layernorm", "reads it is not known"),
            ("qwen3_next", "input_layernorm", "linear_attn"),
        ],
    )
    def test_what_reads_a_norm_must_be_known_to_the_last(
        self, kind: str, norm: str, message: str, tmp_path: Path
    ) -> None:
        source = saved(kind, tmp_path / "model")
        with pytest.raises(UsageError, match=message):
            weightops.edit(source, tmp_path / "out", steps=[{"select": rf".*{norm}\.weight", "fold": True}])
        assert not (tmp_path / "out").exists()

    def test_blocks_that_read_another_norm_are_no_hindrance(self, tmp_path: Path) -> None:
        source = saved("qwen3_next", tmp_path / "model")
        norms = [{"select": r".*post_attention_layernorm\.weight", "fold": True}]
        weightops.edit(source, tmp_path / "out", steps=norms)
        before = logits(source)
        torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=0, atol=1e-5 * float(before.abs().max()))

    def test_stacked_experts_are_not_passed_over(self, tmp_path: Path) -> None:
        source = saved("qwen3_moe", tmp_path / "model")
        weightops.experts(source, tmp_path / "stacked", layout="stacked")
        norms = [{"select": r".*post_attention_layernorm\.weight", "fold": True}]
        with pytest.raises(UsageError, match="experts") as raised:
            weightops.edit(tmp_path / "stacked", tmp_path / "out", steps=norms)
        assert "--layout separate" in str(raised.value.hint)

    def test_what_predicts_further_tokens_reads_the_final_norm_too(self, tmp_path: Path) -> None:
        save_with_mtp(tmp_path / "model")
        with pytest.raises(UsageError, match=r"by what mtp\.fc\.weight is part of") as raised:
            weightops.edit(
                tmp_path / "model", tmp_path / "out", steps=[{"select": r"model\.norm\.weight", "fold": True}]
            )
        assert "--drop mtp" in str(raised.value.hint)


def test_a_direction_is_taken_out_of_what_writes_it(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model")
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    save_file({"refusal": direction / direction.norm()}, tmp_path / "direction.safetensors")
    document = {
        "edit": {
            "source": "model",
            "steps": [
                {
                    "select": r".*\.(o_proj|down_proj)\.weight",
                    "project": {"onto": "direction.safetensors", "side": "output"},
                },
                {"select": r"model\.embed_tokens\.weight", "project": {"onto": "direction.safetensors"}},
            ],
        }
    }
    weightops.edit(written(tmp_path / "steps.yml", document), tmp_path / "out")
    unit = (direction / direction.norm()).double()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert float((unit @ tensor.double()).norm()) < 1e-5
        elif "embed" in name:
            assert float((tensor.double() @ unit).norm()) < 1e-5
    manifest = json.loads((tmp_path / "out" / "weightops-manifest.json").read_text())
    assert "direction.safetensors" in json.dumps(manifest["sources"])


def test_the_tokenizer_of_another(tmp_path: Path) -> None:
    save_tiny(tmp_path / "one", "llama")
    save_tiny(tmp_path / "two", "llama")
    (tmp_path / "two" / "chat_template.jinja").write_text("{{ messages }}")
    steps = [{"select": r"model\.norm\.weight", "scale": {"by": 1.0}}]
    document = {"edit": {"source": "one", "steps": steps, "tokenizer": "two"}}
    weightops.edit(written(tmp_path / "steps.yml", document), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


class TestRefused:
    def test_a_result_that_would_not_load(self, tmp_path: Path) -> None:
        source = saved("llama", tmp_path / "model")
        with pytest.raises(IncompatibleInputs, match=r"would not load: .*model\.norm\.weight"):
            weightops.edit(source, tmp_path / "out", steps=[{"select": r"model\.norm\.weight", "drop": True}])
        assert not (tmp_path / "out").exists()
        weightops.edit(
            source, tmp_path / "out", steps=[{"select": r"model\.norm\.weight", "drop": True}], architecture=False
        )
        assert "model.norm.weight" not in load_file(tmp_path / "out" / "model.safetensors")

    def test_quantised_tensors_are_only_moved(self, tmp_path: Path) -> None:
        source = saved("llama", tmp_path / "model")
        tensors = load_file(source / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match="part of a quantised weight") as raised:
            weightops.edit(
                source, tmp_path / "out", steps=[{"select": r".*0\.mlp\.up_proj\.weight", "take": {"list": [0]}}]
            )
        assert "dequantize" in str(raised.value.hint)
        renaming = [{"select": r"model\.(.*)", "name": "inner.{1}"}]
        weightops.edit(source, tmp_path / "out", steps=renaming, architecture=False)
        assert "inner.layers.0.mlp.up_proj.weight_scale_inv" in load_file(tmp_path / "out" / "model.safetensors")

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ({"edit": {"steps": AS_LLAMA}}, r"steps\.yml:\d+: edit: lacks source"),
            ({"edit": {"source": "model", "step": []}}, r"edit\.step: unknown field"),
            ({"tensors": {}}, "unknown field"),
            ({"sources": {"a": "model", "b": "model"}, "edit": {"source": "a", "steps": AS_LLAMA}}, "used by no step"),
            ({"edit": {"source": "model"}}, "nothing is to be done"),
            ({"edit": {"source": "model", "config": {"unset": "zzz"}}}, r"config\.json has no zzz"),
            ({"edit": {"source": "model", "config": {"sett": {}}}}, "unknown field"),
            ({"edit": {"source": "model", "steps": AS_LLAMA, "tokenizer": "model"}}, "has no tokenizer"),
        ],
    )
    def test_a_file_that_cannot_be_meant(self, document: dict[str, Any], message: str, tmp_path: Path) -> None:
        saved("phi3", tmp_path / "model")
        with pytest.raises(UsageError, match=message):
            weightops.edit(written(tmp_path / "steps.yml", document), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_source_that_is_not_there(self, tmp_path: Path) -> None:
        document = {"edit": {"source": "nowhere", "steps": AS_LLAMA}}
        with pytest.raises(SourceMissing, match="nowhere"):
            weightops.edit(written(tmp_path / "steps.yml", document), tmp_path / "out")


class TestSettings:
    def test_rotary_settings_are_written_for_all_versions(self, tmp_path: Path) -> None:
        source = saved("llama", tmp_path / "model")
        arguments = ["edit", str(source), "--out", str(tmp_path / "out"), "--set", "rope.type=yarn"]
        arguments += ["--set", "rope.factor=4.0", "--set", "rope.original_max_position_embeddings=128"]
        arguments += ["--set", "max_position_embeddings=512", "--set", "rope.theta=20000"]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 20000
        assert config["rope_scaling"]["type"] == config["rope_parameters"]["rope_type"] == "yarn"
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.config.rope_parameters["factor"] == 4.0
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()

    def test_settings_by_kind_of_layer_are_not_mixed_up(self, tmp_path: Path) -> None:
        source = saved("gemma3_text", tmp_path / "model")
        with pytest.raises(UsageError, match="each kind of layer has rotary settings of its own") as raised:
            weightops.edit(source, tmp_path / "out", set={"rope.factor": 8.0, "rope.type": "linear"})
        assert "rope_parameters.full_attention.factor" in str(raised.value.hint)
        own = {"rope_parameters.full_attention.rope_type": "linear", "rope_parameters.full_attention.factor": 8.0}
        weightops.edit(source, tmp_path / "out", set=own)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.config.rope_parameters["full_attention"]["factor"] == 8.0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["rope.type=yarn"], "yarn lacks factor"),
            (["rope.type=yran", "rope.factor=2"], "rope_type yran is not known"),
            (["rope.type=linear", "rope.factor=0.5"], "factor is 0.5, expected a number of at least 1"),
            (["rope.type=longrope", "rope.short_factor=[1, 1]", "rope.long_factor=[1]"], "short_factor has 2 numbers"),
            (["rope.theta=-1"], "rope_theta is -1"),
            (["a=&x [*x]"], "holds an alias"),
            (["a=" + "[" * 3000], "not YAML"),
            (["a=2020-99-99"], "not YAML"),
            (["rope.facter=4"], "rope.facter is no rotary setting"),
            (["rope.a.b=4"], "rope.a.b is no rotary setting"),
            (["rope.partial_rotary_factor=-1"], "partial_rotary_factor is -1, expected more than 0"),
            (["rope.type=yarn", "rope.factor=2", "rope.beta_fast=x"], "beta_fast is 'x', expected a number"),
            (
                ["rope.type=yarn", "rope.factor=2", "rope.original_max_position_embeddings=abc"],
                "original_max_position_embeddings is 'abc'",
            ),
            (
                [
                    *("rope.type=llama3", "rope.factor=2", "rope.original_max_position_embeddings=64"),
                    *("rope.low_freq_factor=4", "rope.high_freq_factor=1"),
                ],
                "low_freq_factor is 4, expected less than high_freq_factor",
            ),
            (
                ["rope.type=longrope", "rope.short_factor=[a, a, a, a, a, a, a, a]", "rope.long_factor=[1]"],
                "short_factor holds 'a'",
            ),
            (["num_attention_heads=0", "head_dim=null", "rope.theta=5"], "num_attention_heads is 0"),
            (["text_config.vocab_size=3"], "has no text_config to set vocab_size in"),
            (["vocab_size=3"], "would not load"),
        ],
    )
    def test_what_cannot_be_is_refused(self, settings: list[str], message: str, tmp_path: Path) -> None:
        source = saved("llama", tmp_path / "model")
        options = [part for setting in settings for part in ("--set", setting)]
        result = CliRunner().invoke(cli, ["edit", str(source), "--out", str(tmp_path / "out"), *options])
        assert result.exit_code in (1, 2)
        assert message in str(result.exception or result.output)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"take": {"range": [0, 10, 0]}}, "a range of step 0 has no end"),
        ({"scale": {"by": float("nan")}}, r"scale\.by: is nan, expected a finite number"),
        ({"scale": {"by": float("inf")}}, "is inf, expected a finite number"),
        ({"scale": {"by": 10**400}}, "more than 62 bits"),
        ({"scale": {"by": 1e39}}, r"1e\+39 is beyond float32"),
        ({"scale": {"by": "model.norm.weight", "axis": 1, "shift": float("nan")}}, "is nan"),
        ({"combine": {"weight": float("nan"), "with": []}}, "is nan"),
        ({"combine": {"with": [{"weight": float("-inf")}]}}, "is -inf"),
        ({"lowrank": {"a": "a", "b": "b", "scale": float("nan")}}, "is nan"),
        ({"fill": {"value": float("nan")}}, "is nan"),
        ({"fill": {"value": 1e39}}, r"is float32, which cannot hold 1e\+39"),
        ({"fill": {"shape": [-1, 4]}}, r"cannot be \[-1, 4\]"),
        ({"fill": {"shape": [0, 4]}}, r"cannot be \[0, 4\]"),
        ({"fill": {"shape": [4], "rows": 4}}, "shape is that of a constant"),
        ({"fill": {"rows": 4, "with": "nothing"}}, "new rows cannot be nothing"),
        ({"drop": True, "keep": True}, r"steps\.0\.keep: drop gives nothing"),
        ({"drop": True, "name": "x"}, r"steps\.0\.name: drop gives nothing"),
        ({"fold": True, "replace": True}, "fold gives nothing"),
        ({"name": "__metadata__"}, "which no tensor can be"),
        ({"name": "a\ud800"}, "which no tensor can be"),
        ({"name": "a{b-c}"}, "is no group of select"),
        ({"name": "x", "select": "(" * 2000 + ")" * 2000}, "no regular expression"),
    ],
)
def test_a_step_that_cannot_be_meant(step: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model")
    step = {"select": r"model\.layers\.0\.mlp\.up_proj\.weight", **step}
    with pytest.raises(UsageError, match=message):
        weightops.edit(source, tmp_path / "out", steps=[step], architecture=False)
    assert not (tmp_path / "out").exists()


def test_an_order_that_names_a_part_twice(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model")
    joined = {"concat": {"by": "x", "order": ["gate", "gate", "up"]}, "name": "x"}
    with pytest.raises(UsageError, match="names gate twice"):
        weightops.edit(
            source, tmp_path / "out", steps=[{"select": r".*\.0\.mlp\.(?P<x>gate|up)_proj\.weight", **joined}]
        )


def test_each_pattern_of_a_list_has_its_own_groups(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model")
    select = [
        r"(?P<p>model\.layers\.0)\.mlp\.(up)_proj\.weight",
        r"(?P<p>model\.layers\.1)\.mlp\.(up|down)_proj\.weight",
    ]
    weightops.edit(source, tmp_path / "out", steps=[{"select": select, "name": "{p}.{2}"}], architecture=False)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {"model.layers.0.up", "model.layers.1.up", "model.layers.1.down"} <= after.keys()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "JSON has no number for"),
        ([1.0, float("inf")], "JSON has no number for"),
        (10**30, "more than 64 bits"),
        (datetime.date(2020, 1, 1), "is a date, which config.json cannot hold"),
        ({"a": b"b"}, r"x\.a is a bytes"),
        ({1, 2}, "is a set"),
        ({1: 2}, "is no text, as JSON has names"),
    ],
)
def test_a_setting_that_json_cannot_hold(value: Any, message: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        weightops.edit(source, tmp_path / "out", set={"x": value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "a..b", "rope."])
def test_a_setting_without_a_name(name: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model")
    with pytest.raises(UsageError, match="is no name of a setting"):
        weightops.edit(source, tmp_path / "out", set={name: 1})


def test_lists_of_modules_follow_names_over_several_steps(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "re:.*layers.2.mlp", "model.layers.3.mlp"]
    config["quantization_config"] = {"quant_method": "compressed-tensors", "ignore": names}
    (source / "config.json").write_text(json.dumps(config))
    steps: list[dict[str, Any]] = [
        {"select": r"model\.layers\.0\.mlp\.up_proj\.weight", "name": "t.weight"},
        {"select": r"model\.layers\.1\.mlp\.up_proj\.weight", "name": "model.layers.0.mlp.up_proj.weight"},
        {"select": r"t\.weight", "name": "model.layers.1.mlp.up_proj.weight"},
        {"select": r"model\.layers\.3\.mlp\..*", "drop": True},
        {"select": r"model\.layers\.2\.mlp\.(.*)", "name": "model.layers.2.ffn.{1}"},
    ]
    weightops.edit(source, tmp_path / "out", steps=steps, architecture=False)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    inner = [f"model.layers.2.ffn.{part}_proj" for part in ("down", "gate", "up")]
    assert ignored[:2] == ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"]
    assert sorted(ignored[2:]) == inner


class TestQuantisedAndTied:
    UP = r"model\.layers\.0\.mlp\.up_proj\.weight"

    def fp8(self, folder: Path, plain: Path, **settings: Any) -> Path:
        shutil.copytree(plain, folder)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        return folder

    @pytest.mark.parametrize("settings", [{}, {"quantization_config": {"quant_method": "fp8"}}])
    @pytest.mark.parametrize("select", [UP, UP + "_scale_inv"])
    def test_nothing_is_taken_of_them(self, settings: dict[str, Any], select: str, tmp_path: Path) -> None:
        source = self.fp8(tmp_path / "fp8", saved("llama", tmp_path / "plain"), **settings)
        with pytest.raises(UsageError, match="part of a quantised weight, which is only moved here"):
            weightops.edit(
                source, tmp_path / "out", steps=[{"select": select, "take": {"list": [0]}}], architecture=False
            )

    def test_they_are_not_moved_into_a_plain_model(self, tmp_path: Path) -> None:
        plain = saved("llama", tmp_path / "plain")
        source = self.fp8(tmp_path / "fp8", plain, quantization_config={"quant_method": "fp8"})
        step = {"select": self.UP, "from": str(source), "name": "{0}", "replace": True}
        with pytest.raises(UsageError, match="what is edited is not quantised so"):
            weightops.edit(plain, tmp_path / "out", steps=[step])
        assert not (tmp_path / "out").exists()

    def test_embedding_and_head_change_together(self, tmp_path: Path) -> None:
        source = saved("llama", tmp_path / "model", tie_word_embeddings=True)
        tensors = load_file(source / "model.safetensors")
        (source / "model.safetensors").unlink()
        torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, source / "pytorch_model.bin")
        doubled = {"select": r"model\.embed_tokens\.weight", "scale": {"by": 2.0}}
        with pytest.raises(UsageError, match=r"are tied, and only model\.embed_tokens\.weight was changed"):
            weightops.edit(source, tmp_path / "out", steps=[doubled])
        assert not (tmp_path / "out").exists()
        weightops.edit(source, tmp_path / "out", steps=[doubled], set={"tie_word_embeddings": False})
        weightops.edit(source, tmp_path / "alone", steps=[doubled, {"select": r"lm_head\.weight", "drop": True}])

    def test_rows_without_a_mean(self, tmp_path: Path) -> None:
        source = saved("llama", tmp_path / "model")
        tensors = load_file(source / "model.safetensors")
        tensors["model.embed_tokens.weight"][3] = float("nan")
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        more = {"select": r"model\.embed_tokens\.weight", "fill": {"rows": 330, "with": "mean"}}
        with pytest.raises(CorruptInput, match="the mean of its rows is not finite"):
            weightops.edit(source, tmp_path / "out", steps=[more], architecture=False)
        assert not (tmp_path / "out").exists()


def test_settings_of_a_model_without_config(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=r"has no config\.json, in which settings are set"):
        weightops.edit(source / "model.safetensors", tmp_path / "out", set={"a": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"set": ["a"]}, "set is a list, expected a mapping"),
        ({"set": {"a": 1}, "other": {"x": 5}}, "other: x is a int, expected a place"),
    ],
)
def test_arguments_of_wrong_types(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        weightops.edit(tmp_path / "model", tmp_path / "out", **given)


def test_a_source_that_is_a_list(tmp_path: Path) -> None:
    file = written(tmp_path / "steps.yml", {"edit": {"source": ["./model"], "config": {"set": {"a": 1}}}})
    with pytest.raises(UsageError, match=r"edit\.source: expected text"):
        weightops.edit(file, tmp_path / "out")
