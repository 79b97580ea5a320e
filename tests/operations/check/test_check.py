"""Check on small models: each fault is found, and nothing is found in healthy ones of many architectures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
import xxhash
from click.testing import CliRunner, Result
from meta_model import make_meta
from safetensors.torch import save_file
from small_tokenizers import sentencepiece_model
from support import write_checkpoint

from weightops import api
from weightops.checkpoint import Checkpoint
from weightops.cli.main import cli
from weightops.cli.pages.check import page
from weightops.engine.control import Control, Progress
from weightops.errors import CorruptInput, Interrupted, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.operations.check.operation import check
from weightops.operations.check.report import CODES, CheckReport, Finding
from weightops.spec import DType, TensorSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": [2, 23],
}
Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def llama(dtype: torch.dtype = torch.float16) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (24, 16), HEAD: (24, 16), "model.norm.weight": (16,)}
    for n in range(3):
        shapes |= {f"model.layers.{n}.self_attn.{p}_proj.weight": (16, 16) for p in "qo"}
        shapes |= {f"model.layers.{n}.self_attn.{p}_proj.weight": (8, 16) for p in "kv"}
        shapes |= {f"model.layers.{n}.mlp.{p}_proj.weight": (20, 16) for p in ("gate", "up")}
        shapes |= {f"model.layers.{n}.mlp.down_proj.weight": (16, 20)}
        shapes |= {f"model.layers.{n}.{p}_layernorm.weight": (16,) for p in ("input", "post_attention")}
    return {
        name: torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def found(report: CheckReport) -> list[tuple[str, str, str]]:
    return [(f.severity, f.code, f.subject) for f in report.findings]


def check_model(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, **options: Any) -> CheckReport:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return check(open_checkpoint(folder), **options)


def test_a_healthy_model(tmp_path: Path) -> None:
    tensors = llama()
    report = check_model(tmp_path, tensors)
    assert (report.findings, report.verdict, report.examined) == ((), True, True)
    assert report.nbytes == sum(t.nbytes for t in tensors.values())
    q = report.tensors[Q].statistics
    assert q is not None
    exact = tensors[Q].double()
    assert (q.minimum, q.maximum, q.elements) == (exact.min().item(), exact.max().item(), 256)
    assert q.std == pytest.approx(exact.std(correction=0).item(), rel=1e-12)


def poke(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = value

    return change


def fill(name: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


def drop(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


def add(*names: str, tensor: torch.Tensor | None = None) -> Callable[[Tensors], None]:
    made = torch.randn(4, 4, generator=torch.Generator().manual_seed(9)).half() if tensor is None else tensor
    return lambda tensors: tensors.update({name: made + i for i, name in enumerate(names)})


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        renamed = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return change


def copy(source: str, target: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({target: tensors[source].clone()})


def small(tensors: Tensors) -> None:
    tensors[Q] *= 2.0**-16


def pad(tensors: Tensors) -> None:
    tensors[EMBEDDING][5:8] = 0


def wide(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].float()
        poke(name, value)(tensors)

    return change


UNWRAPPED = ("note", "unchecked", "config.json")
LAYER_1 = [name for name in llama() if name.startswith("model.layers.1.")]
FAULTS: dict[str, tuple[Callable[[Tensors], None], list[tuple[str, str, str]]]] = {
    "nan": (poke(Q, math.nan), [("error", "nan", Q)]),
    "infinite": (poke(Q, -math.inf), [("error", "infinite", Q)]),
    "zero": (fill(Q, 0.0), [("warning", "zero", Q)]),
    "zero norm": (fill("model.norm.weight", 0.0), [("warning", "zero", "model.norm.weight")]),
    "zero bias": (
        add("model.layers.0.mlp.up_proj.bias", tensor=torch.zeros(20).half()),
        [("note", "zero", "model.layers.0.mlp.up_proj.bias")],
    ),
    "constant": (fill(Q, 0.5), [("warning", "constant", Q)]),
    "ones in a matrix": (fill(Q, 1.0), [("warning", "constant", Q)]),
    "subnormal": (small, [("note", "subnormal", Q)]),
    "zero rows": (pad, [("note", "zero-rows", EMBEDDING)]),
    "above float16": (wide(Q, 7e4), [("note", "mixed-dtype", Q), ("note", "fp16-range", Q)]),
    "empty": (
        add("model.layers.1.self_attn.q_proj.bias", tensor=torch.zeros(0).half()),
        [
            ("error", "empty", "model.layers.1.self_attn.q_proj.bias"),
            ("error", "config-shape", "model.layers.1.self_attn.q_proj.bias"),
        ],
    ),
    "duplicate": (copy(Q, Q.replace("1", "2")), [("warning", "duplicate", Q)]),
    "head and embedding equal": (copy(EMBEDDING, HEAD), [("note", "tie", HEAD)]),
    "head missing": (drop(HEAD), [("error", "tie", HEAD)]),
    "tensor missing": (drop(UP), [("error", "missing", UP)]),
    "layer missing": (
        drop(*LAYER_1),
        [("error", "layers", "model.layers.1"), ("error", "config-layers", "config.json")],
    ),
    "no layers": (
        drop(*(name for name in llama() if ".layers." in name)),
        [("error", "config-layers", "config.json")],
    ),
    "shape": (
        lambda tensors: tensors.update({Q: tensors[Q][:, :8].clone()}),
        [("error", "config-shape", Q)],
    ),
    "rotary": (
        add("model.layers.0.self_attn.rotary_emb.inv_freq", tensor=torch.ones(2)),
        [("note", "leftover", "model.layers.0.self_attn.rotary_emb.inv_freq")],
    ),
    "optimizer": (
        add("optimizer.state.0.exp_avg"),
        [("warning", "leftover", "optimizer.state.0.exp_avg"), ("warning", "unexpected", "optimizer.state.0.exp_avg")],
    ),
    "compiled": (rename("model.", "_orig_mod.model."), [("error", "leftover", "_orig_mod." + EMBEDDING), UNWRAPPED]),
    "lora": (
        add(*(f"model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB")),
        [
            ("error", "lora", "model.layers.0.self_attn.q_proj.lora_A.weight"),
            ("warning", "unexpected", "model.layers.0.self_attn.q_proj.lora_A.weight"),
        ],
    ),
    "quantised": (
        add("model.layers.0.self_attn.q_proj.qweight"),
        [
            ("error", "leftover", "model.layers.0.self_attn.q_proj.qweight"),
            ("error", "quantization", "config.json"),
            ("warning", "unexpected", "model.layers.0.self_attn.q_proj.qweight"),
        ],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_nothing_else(fault: str, tmp_path: Path) -> None:
    change, expected = FAULTS[fault]
    tensors = llama()
    change(tensors)
    assert found(check_model(tmp_path, tensors)) == expected


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], list[tuple[str, str, str]]]] = {
    "vocabulary": (
        {"vocab_size": 25},
        [("error", "config-shape", EMBEDDING), ("error", "config-shape", HEAD)],
    ),
    "kv heads": (
        {"num_key_value_heads": 4},
        [("error", "config-shape", f"model.layers.0.self_attn.{p}_proj.weight") for p in "kv"],
    ),
    "one kv head": (
        {"num_key_value_heads": 1},
        [("error", "config-shape", f"model.layers.0.self_attn.{p}_proj.weight") for p in "kv"],
    ),
    "head size": (
        {"head_dim": 8},
        [("error", "config-shape", f"model.layers.0.self_attn.{p}_proj.weight") for p in "kovq"],
    ),
    "heads do not divide": ({"num_attention_heads": 3}, [("error", "config", "config.json")] * 2),
    "no number": ({"hidden_size": "16"}, [("error", "config", "config.json")]),
    "layers": ({"num_hidden_layers": 4}, [("error", "config-layers", "config.json")]),
    "dtype": ({"torch_dtype": "bfloat16"}, [("warning", "config-dtype", "config.json")]),
    "no dtype": ({"torch_dtype": "half-ish"}, [("warning", "config", "config.json")]),
    "tied and different": ({"tie_word_embeddings": True}, [("error", "tie", HEAD)]),
    "quantised in name only": (
        {"quantization_config": {"bits": 4}},
        [("warning", "leftover", "config.json"), ("note", "unchecked", "config.json")],
    ),
    "special token": ({"pad_token_id": 24}, [("error", "token-id", "config.json")]),
    "no special token": ({"pad_token_id": -1}, [("note", "token-id", "config.json")]),
    "unknown architecture": ({"model_type": "other"}, [("note", "unchecked", "config.json")]),
    "unknown architecture, other width": (
        {"model_type": "other", "hidden_size": 17},
        [
            ("warning", "config-shape", EMBEDDING),
            ("warning", "config-shape", HEAD),
            ("note", "unchecked", "config.json"),
        ],
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_fault_of_the_configuration_is_found(fault: str, tmp_path: Path) -> None:
    change, expected = CONFIG_FAULTS[fault]
    assert sorted(found(check_model(tmp_path, llama(), {**CONFIG, **change}))) == sorted(expected)


def test_a_configuration_that_is_no_json_is_an_error_of_the_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama())
    (tmp_path / "config.json").write_text("{")
    report = check(open_checkpoint(tmp_path))
    assert found(report) == [("error", "config", "config.json"), ("note", "unchecked", "config.json")]


def test_shapes_are_named_with_what_they_should_be(tmp_path: Path) -> None:
    report = check_model(tmp_path, llama(), {**CONFIG, "intermediate_size": 24})
    down, gate, up = report.findings
    assert up.message == (
        "model.layers.0.mlp.up_proj.weight is [20, 16], config.json says [24, 16] (intermediate_size, hidden_size), "
        "and so are 2 more of its kind"
    )
    assert (down.code, gate.code) == ("config-shape", "config-shape")


def test_layers_of_an_unknown_architecture_are_held_against_one_another(tmp_path: Path) -> None:
    tensors = {name.replace("model.layers", "decoder.blocks"): tensor for name, tensor in llama().items()}
    del tensors["decoder.blocks.1.mlp.up_proj.weight"]
    tensors["decoder.blocks.2.mlp.down_proj.weight"] = torch.randn(16, 24)
    assert found(check_model(tmp_path, tensors, {**CONFIG, "model_type": "other"})) == [
        ("warning", "layers", "decoder.blocks.1.mlp.up_proj.weight"),
        ("warning", "layers", "decoder.blocks.2.mlp.down_proj.weight"),
        ("note", "unchecked", "config.json"),
        ("note", "mixed-dtype", "decoder.blocks.2.mlp.down_proj.weight"),
    ]


def test_a_bound_on_magnitudes(tmp_path: Path) -> None:
    tensors = llama()
    tensors[Q][0, 0] = -9
    report = check_model(tmp_path, tensors, max_abs=8.5)
    assert [f.message for f in report.findings] == [f"{Q} has a magnitude of 9, expected at most 8.5"]


def test_names_of_the_same_bytes_are_read_once_and_no_duplicates(tmp_path: Path) -> None:
    tensors = llama()
    tensors[HEAD] = tensors[EMBEDDING]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    report = check(open_checkpoint(tmp_path))
    assert found(report) == [("note", "shared", HEAD)]
    assert report.tensors[HEAD] == report.tensors[EMBEDDING]


def test_without_values_no_tensor_is_read(tmp_path: Path) -> None:
    tensors = llama()
    tensors[Q][0, 0] = math.nan
    write_checkpoint(tmp_path, tensors, {**CONFIG, "vocab_size": 25})
    checkpoint = open_checkpoint(tmp_path)
    header = (tmp_path / "model.safetensors").read_bytes()[:8]
    (tmp_path / "model.safetensors").write_bytes(header)
    report = check(checkpoint, values=False)
    assert [f.code for f in report.findings] == ["config-shape", "config-shape"]
    assert not report.examined
    assert report.tensors[Q].statistics is report.tensors[Q].xxh3_128 is None


def test_findings_can_be_ignored(tmp_path: Path) -> None:
    tensors = llama()
    tensors[Q][0, 0] = math.nan
    report = check_model(tmp_path, tensors, {**CONFIG, "torch_dtype": "float32"}, ignore=["nan", "duplicate"])
    assert (found(report), report.ignored_count) == ([("warning", "config-dtype", "config.json")], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ["nan", "nans"]}, "unknown code 'nans'"),
        ({"max_abs": 0.0}, "max_abs is 0.0"),
        ({"max_abs": math.nan}, "max_abs is nan"),
        ({"max_abs": 1.0, "values": False}, "which are not read"),
    ],
)
def test_requests_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(Checkpoint("x", {}), **options)


def tokenizer_json(count: int, added: int = 0) -> str:
    extra = [{"id": count + i, "content": f"<{i}>"} for i in range(added)]
    return json.dumps({"added_tokens": extra, "model": {"type": "BPE", "vocab": {str(i): i for i in range(count)}}})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.json": tokenizer_json(24)}, []),
        ({"tokenizer.json": tokenizer_json(22, 2)}, []),
        ({"tokenizer.json": tokenizer_json(24, 1)}, [("error", "tokenizer", "tokenizer.json")]),
        ({"tokenizer.json": tokenizer_json(20)}, [("note", "padding", "tokenizer.json")]),
        ({"tokenizer.json": "{}"}, [("error", "tokenizer", "tokenizer.json")]),
        ({"vocab.json": json.dumps({"a": 0, "b": 22})}, [("note", "padding", "vocab.json")]),
        (
            {"vocab.json": json.dumps({"a": 0}), "added_tokens.json": json.dumps({"<x>": 24})},
            [("error", "tokenizer", "added_tokens.json")],
        ),
        (
            {"tokenizer_config.json": json.dumps({"added_tokens_decoder": {"24": {}, "x": {}}})},
            [("error", "tokenizer", "tokenizer_config.json")],
        ),
        (
            {"generation_config.json": json.dumps({"eos_token_id": [2, 30]})},
            [("error", "token-id", "generation_config.json")],
        ),
        ({"generation_config.json": "[]"}, [("error", "config", "generation_config.json")]),
    ],
)
def test_the_tokenizer_against_the_embedding(
    files: dict[str, str], expected: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert found(check_model(tmp_path, llama())) == expected


def test_a_sentencepiece_model_is_counted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    (finding,) = check_model(tmp_path, llama()).findings
    assert finding.message == "tokenizer.model has ids up to 1499, the embedding has 24 rows"


def test_what_opening_warns_of_and_what_lies_beside(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama(), CONFIG, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"total_size": ', '"total_size": 1'))
    save_file({"x": torch.ones(2)}, tmp_path / "old.safetensors")
    (tmp_path / "modeling_x.py").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling_x.T", null]}}')
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert found(check(open_checkpoint(tmp_path), values=False)) == [
        ("error", "file", "generation_config.json"),
        ("error", "config", "generation_config.json"),
        ("warning", "index", "model.safetensors.index.json"),
        ("warning", "file", "old.safetensors"),
        ("note", "file", "modeling_x.py"),
        ("note", "file", "trainer_state.json"),
    ]


def test_a_tensor_that_is_not_as_its_manifest_says(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama(), CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    digests = {name: report.xxh3_128 or "" for name, report in check(checkpoint).tensors.items()}
    assert check(replace(checkpoint, digests=digests)).findings == ()
    report = check(replace(checkpoint, digests={**digests, Q: "0" * 32}))
    assert found(report) == [("error", "manifest", Q)]


@pytest.mark.parametrize("name", ["adapter_config.json", "weightops-delta.json"])
def test_what_is_no_model_is_not_held_against_one(name: str, tmp_path: Path) -> None:
    lora = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.randn(4, 4) for x in "AB"}
    write_checkpoint(tmp_path, {**lora, "lm_head.weight": torch.randn(4, 4)})
    (tmp_path / name).write_text("{}")
    report = check(open_checkpoint(tmp_path))
    assert {f.code for f in report.findings} - {"lora"} == {"unchecked"}
    assert ("lora" in {f.code for f in report.findings}) == (name != "adapter_config.json")


def test_parts_in_metas_layout(tmp_path: Path) -> None:
    sizes = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": None, "ffn_dim": 128, "vocab": 1500}
    make_meta(tmp_path, **sizes, parts=2, dtype=torch.bfloat16, tokenizer=sentencepiece_model())
    report = check(open_checkpoint(tmp_path))
    assert [(f.severity, f.code) for f in report.findings] == [("note", "leftover"), ("note", "unchecked")]
    assert len(report.tensors) == 2 * 31


def test_values_of_ggmls_blocks_are_looked_at_and_their_bytes_digested(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("token_embd.weight", weights)
    packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    packed[3, :2] = (0, 0x7E)  # a scale of NaN
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = check(open_checkpoint(path))
    assert [f.code for f in report.findings] == ["nan", "unchecked"]
    packed_report = report.tensors["blk.0.ffn_up.weight"]
    assert packed_report.spec == TensorSpec(DType.Q8_0, (4, 64))
    assert packed_report.xxh3_128 == xxhash.xxh3_128_hexdigest(packed.tobytes())
    assert packed_report.statistics is not None
    assert (packed_report.statistics.elements, packed_report.statistics.nan) == (256, 32)


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
    "granite": {},
    "mixtral": {"num_local_experts": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_models_of_transformers_have_nothing_wrong(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **ARCHITECTURES[model_type])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    report = check(open_checkpoint(tmp_path))
    assert [f for f in report.findings if f.severity != "note"] == []
    assert "unchecked" not in {f.code for f in report.findings}


def test_it_stops_when_it_is_asked_to(tmp_path: Path) -> None:
    control = Control()
    control.cancel()
    with pytest.raises(Interrupted, match="interrupted"):
        check_model(tmp_path, llama(), control=control)


def test_the_api_hands_on_who_may_stop_it_and_who_watches(tmp_path: Path) -> None:
    check_model(tmp_path, llama())
    stopped = Control()
    stopped.cancel()
    with pytest.raises(Interrupted, match="interrupted"):
        api.check(tmp_path, control=stopped)
    watched = Control(Steps())
    assert api.check(tmp_path, control=watched).verdict
    assert watched.progress.seen == sum(t.nbytes for t in llama().values())
    assert api.check(tmp_path, values=False).examined is False
    assert api.check(tmp_path, max_abs=0.5, workers=1).counts["warning"] > 20
    assert api.check(tmp_path, max_abs=0.5, ignore=["range"]).ignored == ("range",)


class Steps(Progress):
    """Adds up what was done."""

    def __init__(self) -> None:
        self.seen = 0

    def advance(self, nbytes: int) -> None:
        self.seen += nbytes


def test_a_file_that_was_cut_after_it_was_opened(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama(), CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptInput, match="changed while it was being read"):
        check(checkpoint)


def test_the_document(tmp_path: Path) -> None:
    tensors = llama()
    tensors[Q][0, 0] = math.inf
    report = check_model(tmp_path, tensors, ignore=["zero"])
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (document["schema"], document["verdict"]) == ("weightops-check/1", False)
    assert document["counts"] == {"error": 1, "warning": 0, "note": 0}
    assert document["findings"][0]["subject"] == Q
    q = document["tensors"][Q]
    assert (q["dtype"], q["shape"], q["file"]) == ("float16", [16, 16], "model.safetensors")
    assert q["counts"] == {"nan": 0, "inf": 1, "zero": 0, "subnormal": 0}
    assert sum(q["log2_histogram"].values()) == 255
    assert q["absmax"] == max(-q["min"], q["max"])
    assert document["tensors"]["model.norm.weight"]["log2_histogram"] == {"0": 16}


def test_every_code_of_a_finding_is_known() -> None:
    codes = {code for _, expected in (*FAULTS.values(), *CONFIG_FAULTS.values()) for _, code, _ in expected}
    assert codes <= CODES.keys()


def run(*arguments: Any) -> Result:
    """The command."""
    return CliRunner().invoke(cli, ["check", *map(str, arguments), "--quiet"])


def test_the_command(tmp_path: Path) -> None:
    tensors = llama()
    tensors[Q][0, 0] = math.nan
    check_model(tmp_path, tensors)
    shown = run(tmp_path)
    assert shown.exit_code == 0
    row, _, hint, _, summary = shown.stdout.splitlines()
    assert row.split(maxsplit=3)[:2] == ["error", "nan"]
    assert row.endswith("holds 1 of 256 elements (0.391 %) NaN, expected none")
    assert hint.startswith("Hint: nan: ")
    assert summary.startswith(f"{tmp_path.name}: 1 error (30 tensors, ")
    assert run(tmp_path, "--strict").exit_code == 3
    ignored = run(tmp_path, "--strict", "--ignore", "nan")
    assert (ignored.exit_code, ignored.stdout) == (0, "")
    assert run(tmp_path, "--ignore", "nonsense").exit_code == 2
    assert json.loads(run(tmp_path, "--json").stdout)["counts"]["error"] == 1
    assert json.loads(run(tmp_path, "--json", "--no-values").stdout)["examined"] is False


def test_a_page_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    result = run(tmp_path / "model", "--html", tmp_path / "none" / "page.html")
    assert isinstance(result.exception, UsageError)


def test_names_from_files_do_nothing_to_a_terminal_or_a_page(tmp_path: Path) -> None:
    name = "x\x1b[31m<script>&.weight"
    save_file({name: torch.full((2, 2), math.nan)}, tmp_path / "model.safetensors")
    shown = run(tmp_path, "--html", tmp_path / "page.html").stdout
    assert "\x1b" not in shown
    assert "x\\x1b[31m<script>" in shown
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "x\\x1b[31m&lt;script&gt;&amp;.weight" in text


def test_the_page_shows_a_layer_that_stands_out(tmp_path: Path) -> None:
    tensors = llama()
    tensors[UP] *= 64
    report = check_model(tmp_path, tensors)
    text = page(report).decode()
    cells = text.partition("standard deviation")[2].partition("</table>")[0]
    assert cells.count('<td class="p4"') == 1
    assert page(replace(report, tensors={}, findings=(Finding("note", "file", "x", "y", "z"),)))


def test_torch_is_not_imported(tmp_path: Path) -> None:
    check_model(tmp_path, llama())
    script = """
import sys
from weightops.formats.folder import open_checkpoint
from weightops.operations.check import check
assert check(open_checkpoint(sys.argv[1])).verdict
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
