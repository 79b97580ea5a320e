"""GGUF of every family, there and back: the bytes of llama.cpp's converter, and what transformers had saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import FAMILIES, save_family, save_mxfp4, save_with_sight
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from weightops import api
from weightops.errors import UsageError, WeightopsError

DIGESTS = json.loads((Path(__file__).parents[2] / "golden/llamacpp/digests.json").read_text())
"""SHA-256 of the files that convert_hf_to_gguf of llama-cpp-python 0.3.36 makes of these very models."""
UNSAID = {
    "_name_or_path": "the folder",
    "transformers_version": "of nothing in the file",
    "model_type": "Mistral is one of LLaMA to llama.cpp",
    "architectures": "likewise",
    "dtype": "compared with the tensors",
    "pretraining_tp": "of LLaMA's configuration, and not of Mistral's",
    "attention_bias": "likewise",
    "mlp_bias": "likewise",
    "sliding_window_pattern": "in the words of transformers 4",
    "moe_layer_freq": "likewise",
    "topk_method": "likewise",
    "hidden_activation": "likewise",
}
"""Fields in which configurations may differ, and why that is nothing."""


def convert(source: Path, out: Path, to: str, **options: Any) -> api.Result:
    return api.convert(source, out, to=to, **options)


def round_trip(tmp_path: Path, name: str, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, Path]:
    """A family's model, and the folder that came of its GGUF file."""
    folder = tmp_path / "model"
    (tmp_path / "gguf").mkdir()
    model = save_family(folder, name, dtype)
    convert(folder, tmp_path / "gguf/model.gguf", "gguf")
    convert(tmp_path / "gguf/model.gguf", tmp_path / "back", "hf", **options)
    return model, tmp_path / "back"


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]) for name, tensor in left.items()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_files_are_those_of_the_converter(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.replace(" ", "")
    save_family(folder, name)
    for kind, dtype in {"f16": "float16", "q8_0": "q8_0"}.items():
        made = tmp_path / "made.gguf"
        convert(folder, made, "gguf", dtype=dtype, overwrite=True)
        assert hashlib.sha256(made.read_bytes()).hexdigest() == DIGESTS[name][kind], kind


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i % 3 == 0 else pytest.mark.slow) for i, name in enumerate(FAMILIES)]
)
def test_there_and_back_is_what_it_was(tmp_path: Path, name: str) -> None:
    model, back = round_trip(tmp_path, name, torch.bfloat16)
    assert same(load_file(back / "model.safetensors"), load_file(tmp_path / "model/model.safetensors"))
    found, expected = (AutoConfig.from_pretrained(folder).to_dict() for folder in (back, tmp_path / "model"))
    found["rope_parameters"].pop("type", None)  # which transformers 4 asks for
    differ = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
    assert differ <= UNSAID.keys(), {key: (found.get(key), expected.get(key)) for key in differ}
    loaded = AutoModelForCausalLM.from_pretrained(back, dtype=torch.bfloat16)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["llama 3", "gemma2", "mixtral"])
def test_other_types_come_back_as_well(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    _, back = round_trip(tmp_path, name, dtype)
    assert same(load_file(back / "model.safetensors"), load_file(tmp_path / "model/model.safetensors"))
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_norms_of_gemma_come_back_as_the_nearest_and_it_is_counted(tmp_path: Path) -> None:
    """1 + w in float32 has no place for all digits of a small w."""
    (tmp_path / "model").mkdir()
    (tmp_path / "gguf").mkdir()
    save_family(tmp_path / "model", "gemma2", torch.float32)
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.norm.weight"] = torch.linspace(-1e-3, 1e-3, 64)
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    convert(tmp_path / "model", tmp_path / "gguf/model.gguf", "gguf")
    convert(tmp_path / "gguf/model.gguf", tmp_path / "back", "hf", dtype="bfloat16")
    found = load_file(tmp_path / "back/model.safetensors")["model.norm.weight"]
    assert torch.equal(found, ((tensors["model.norm.weight"] + 1) - 1).bfloat16())
    losses = json.loads((tmp_path / "back/weightops-manifest.json").read_text())["losses"]
    assert losses["model.norm.weight"]["changed"] > 32


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("qwen2", {"model_type": "qwen4"}, "model_type qwen4 is not converted to GGUF"),
        ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, "gptq, and every weight is plain"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
        ("mixtral", {"num_local_experts": 5}, "layer 0 has 4 experts"),
        ("phi3", {"num_hidden_layers": 3}, "model.layers.2.* is missing"),
        ("qwen2", {"intermediate_size": 64}, "mlp.* config.json says"),
        ("phi3", {"num_hidden_layers": 1}, "is no tensor of a phi3 model"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, changes: dict[str, Any], match: str
) -> None:
    save_family(tmp_path / "model", name)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(WeightopsError, match=match):
        convert(tmp_path / "model", tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_families_go_to_no_layout_of_llama(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    save_family(tmp_path / "model", "qwen3")
    convert(tmp_path / "model", tmp_path / "gguf/model.gguf", "gguf")
    for source in ("model", "gguf/model.gguf"):
        with pytest.raises(UsageError, match="model_type qwen3 is not converted"):
            convert(tmp_path / source, tmp_path / "out", "meta")


def test_llama_goes_to_every_layout(tmp_path: Path) -> None:
    """By way of GGUF, Meta's files are those that come of transformers' own."""
    round_trip(tmp_path, "llama", torch.float16)
    convert(tmp_path / "model", tmp_path / "expected", "meta", set={"context_length": "256"})
    convert(tmp_path / "gguf/model.gguf", tmp_path / "found", "meta", model_parallel=1)
    left, right = (torch.load(tmp_path / name / "consolidated.00.pth") for name in ("found", "expected"))
    assert same(left, right)
    assert (tmp_path / "found/params.json").read_bytes() == (tmp_path / "expected/params.json").read_bytes()
    convert(tmp_path / "gguf/model.gguf", tmp_path / "small.gguf", "gguf", dtype="q8_0")
    convert(tmp_path / "model", tmp_path / "expected.gguf", "gguf", dtype="q8_0")
    # The tokenizer.json on the way says one thing more, that nothing is put between two texts.
    assert (tmp_path / "small.gguf").read_bytes()[-100_000:] == (tmp_path / "expected.gguf").read_bytes()[-100_000:]


def test_a_pre_tokenizer_that_has_no_name_can_be_named(tmp_path: Path) -> None:
    save_family(tmp_path / "model", "qwen2")
    path = tmp_path / "model/tokenizer.json"
    document = json.loads(path.read_text())
    document["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="no name") as caught:
        convert(tmp_path / "model", tmp_path / "model.gguf", "gguf")
    assert "--set pre=NAME" in str(caught.value.hint)
    convert(tmp_path / "model", tmp_path / "model.gguf", "gguf", set={"pre": "gpt-2"})
    assert b"gpt-2" in (tmp_path / "model.gguf").read_bytes()[:1000]


def test_what_is_quantised_otherwise_is_read_as_its_numbers(tmp_path: Path) -> None:
    """FP8 with a scale for each tile, whose product in float32 is rounded once."""
    save_family(tmp_path / "model", "qwen3")
    tensors = load_file(tmp_path / "model/model.safetensors")
    expected = dict(tensors)
    for name in [name for name in tensors if "_proj" in name]:
        codes = tensors[name].float().to(torch.float8_e4m3fn)
        scale = torch.full((1, 1), 0.3)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        expected[name] = codes.float() * scale
    folder = tmp_path / "fp8"
    folder.mkdir()
    for path in (tmp_path / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, tmp_path / "model/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    for source in ("model", "fp8"):
        convert(tmp_path / source, tmp_path / f"{source}.gguf", "gguf", dtype="float16")
    found, plain = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("fp8", "model"))
    assert found[-50_000:] == plain[-50_000:]


def test_experts_in_mxfp4_keep_their_bits(tmp_path: Path) -> None:
    """As gpt-oss is published; gguf reads the numbers that transformers makes of the same codes."""
    import gguf
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    save_mxfp4(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    convert(tmp_path / "model", tmp_path / "model.gguf", "gguf")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stem = "model.layers.1.mlp.experts"
    for side, names in {"gate_up": ("gate", "up"), "down": ("down",)}.items():
        packed = (tensors[f"{stem}.{side}_proj_{part}"] for part in ("blocks", "scales"))
        expected = convert_moe_packed_tensors(*packed, dtype=torch.float32).transpose(1, 2)
        for i, name in enumerate(names):
            tensor = found[f"blk.1.ffn_{name}_exps.weight"]
            assert tensor.tensor_type is gguf.GGMLQuantizationType.MXFP4
            numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(numbers, expected[:, i :: len(names)])
    digest = hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()
    assert digest == DIGESTS["gpt-oss in mxfp4"]["bf16"]


def test_of_a_model_that_sees_the_language_model_is_taken(tmp_path: Path) -> None:
    save_with_sight(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "made.gguf", "gguf", dtype="float16")
    assert hashlib.sha256((tmp_path / "made.gguf").read_bytes()).hexdigest() == DIGESTS["gemma3 with sight"]["f16"]
    dropped = json.loads((tmp_path / "made.gguf.weightops-manifest.json").read_text())["recipe"]["dropped"]
    assert all("vision_" in name or "projector" in name for name in dropped)
    assert len(dropped) > 10
