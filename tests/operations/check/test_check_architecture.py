"""Models of any family against transformers' own class: good ones pass, what is missing, odd or hostile is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, GEMMA_3N, GEMMA_4, quantize_tiny, save_tiny
from transformers import CONFIG_MAPPING, PreTrainedModel

import weightops
from weightops.cli.main import cli
from weightops.cli.pages.check import page
from weightops.formats.folder import open_checkpoint
from weightops.layouts import architecture
from weightops.operations.check.operation import check
from weightops.operations.check.report import CheckReport

LARGE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EARLY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
VISION = {**TEXT, "image_size": 32, "patch_size": 16}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
Family = tuple[str, dict[str, Any]]
FEW: dict[str, Family] = {
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", EARLY),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "jamba": (
        "JambaForCausalLM",
        {
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_offset": 1,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {**LARGE, "model_type": "llama"}, "vision_config": VISION},
    ),
    "bart": ("BartForConditionalGeneration", ENCODER_DECODER),
}
MANY: dict[str, Family] = {
    "llama": ("LlamaForSequenceClassification", {}),
    "mistral": ("MistralModel", {}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS),
    "qwen3_next": ("Qwen3NextForCausalLM", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "phimoe": ("PhimoeForCausalLM", {"num_local_experts": 4}),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3_text": ("Gemma3ForCausalLM", {}),
    "gemma3n_text": ("Gemma3nForCausalLM", GEMMA_3N),
    "gemma4_text": ("Gemma4ForCausalLM", GEMMA_4),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**MLA, "moe_intermediate_size": 16, "n_routed_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**MLA, "moe_intermediate_size": 16, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4}),
    "llama4_text": ("Llama4ForCausalLM", {"num_local_experts": 2, "intermediate_size_mlp": 48}),
    "granite": ("GraniteForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {"num_local_experts": 4}),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {**MAMBA, "num_local_experts": 4, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "bamba": ("BambaForCausalLM", {**MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1ForCausalLM", {**MAMBA, "mamba_d_ssm": 64}),
    "mamba": ("MambaForCausalLM", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": ("Mamba2ForCausalLM", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "minimax": ("MiniMaxForCausalLM", {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": 4, "moe_intermediate_size": 16}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {"num_experts": 4}),
    "glm4": ("Glm4ForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gptj": ("GPTJForCausalLM", {**EARLY, "rotary_dim": 8}),
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 32}),
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForSequenceClassification", {}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**ENCODER_DECODER, "max_source_positions": 32, "max_target_positions": 32},
    ),
    "clip": ("CLIPModel", {"text_config": {**TEXT, "vocab_size": 64}, "vision_config": VISION}),
    "vit": ("ViTForImageClassification", VISION),
    "gemma3": ("Gemma3ForConditionalGeneration", {"text_config": LARGE, "vision_config": VISION}),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**LARGE, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
            **{f"{token}_token_id": i for i, token in enumerate(("image", "video", "vision_start", "vision_end"), 3)},
        },
    ),
}
COMPOSITE = ("text_config", "d_model", "image_size")


def make(folder: Path, family: str, **options: Any) -> PreTrainedModel:
    """Save a model of a family with random weights; returns it."""
    name, own = (FEW | MANY)[family]
    sizes = {} if any(key in own for key in COMPOSITE) and family != "mpt" else dict(LARGE)
    if family == "falcon":
        del sizes["head_dim"]  # which its config computes
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model: PreTrainedModel = kind(CONFIG_MAPPING[family](**{**sizes, **own}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder, **options)
    return model


def findings(report: CheckReport) -> list[tuple[str, str, str]]:
    return [(f.severity, f.code, f.subject) for f in report.findings if f.severity != "note"]


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hold(folder: Path, family: str) -> None:
    """A model of a family passes, and every third tensor is missed by its name in the file, of which some are tied."""
    model = make(folder, family)
    whole = check(open_checkpoint(folder), values=False)
    assert findings(whole) == []
    assert whole.held_against == f"{type(model).__name__} of transformers {transformers.__version__}"
    tensors = load_file(folder / "model.safetensors")
    dropped = sorted(tensors.keys() - {"final_logits_bias"})[::3]  # that of BART is computed where it is not
    save(folder, {name: tensor for name, tensor in tensors.items() if name not in dropped})
    (found,) = [f for f in check(open_checkpoint(folder), values=False).findings if f.severity != "note"]
    assert (found.severity, found.code) == ("error", "missing")
    assert found.message.startswith(f"{len(dropped)} tensor")
    assert found.subject in dropped


@pytest.mark.parametrize("family", FEW)
def test_models_that_transformers_saves_pass_and_what_they_lack_is_named(tmp_path: Path, family: str) -> None:
    hold(tmp_path, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", MANY)
def test_so_do_those_of_many_families(tmp_path: Path, family: str) -> None:
    hold(tmp_path, family)


def test_each_tensor_of_a_model_is_missed_by_itself(tmp_path: Path) -> None:
    make(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        save(tmp_path, {n: t for n, t in tensors.items() if n != name})
        assert findings(check(open_checkpoint(tmp_path), values=False)) == [("error", "missing", name)]


@pytest.fixture
def qwen(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a model, and its tensors."""
    make(tmp_path, "qwen3")
    return tmp_path, load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("prefix", ["base_model.model.", "policy.", "a.b.c."])
def test_names_that_are_all_wrapped(qwen: tuple[Path, dict[str, torch.Tensor]], prefix: str) -> None:
    folder, tensors = qwen
    save(folder, {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    (found,) = check(open_checkpoint(folder), values=False).findings
    assert (found.severity, found.code) == ("error", "missing")
    assert found.message == f"every name begins with {prefix}, and those of Qwen3ForCausalLM do not"
    assert f"--drop-prefix {prefix}" in found.hint


def test_other_shapes_and_tensors_that_the_model_does_not_have(qwen: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = qwen
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.randn(40, 32)
    tensors["model.layers.0.mlp.side.weight"] = torch.randn(4, 4)
    save(folder, tensors)
    report = check(open_checkpoint(folder), values=False)
    assert findings(report) == [
        ("error", "config-shape", "model.layers.0.mlp.up_proj.weight"),
        ("warning", "unexpected", "model.layers.0.mlp.side.weight"),
    ]
    assert report.findings[0].message == (
        "model.layers.0.mlp.up_proj.weight is [40, 32], Qwen3ForCausalLM by config.json has [48, 32], "
        "and so are 1 more of its kind"
    )


def test_ties_are_those_of_the_model(tmp_path: Path) -> None:
    make(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert check(open_checkpoint(tmp_path), values=False).verdict
    # Which of the two names is stored does not matter.
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save(tmp_path, tensors)
    assert check(open_checkpoint(tmp_path), values=False).verdict
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    expected = [("error", "missing", "model.embed_tokens.weight")]
    assert findings(check(open_checkpoint(tmp_path), values=False)) == expected


def test_names_without_the_first_part_stacked_experts_and_older_names(tmp_path: Path) -> None:
    make(tmp_path, "gpt2")
    tensors = load_file(tmp_path / "model.safetensors")
    save(tmp_path, {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    assert check(open_checkpoint(tmp_path), values=False).verdict
    make(tmp_path / "stacked", "mixtral", save_original_format=False)
    assert check(open_checkpoint(tmp_path / "stacked"), values=False).verdict
    make(tmp_path / "older", "mixtral")
    tensors = load_file(tmp_path / "older" / "model.safetensors")
    mixed = load_file(tmp_path / "stacked" / "model.safetensors")
    taken = {n: t for n, t in mixed.items() if n.startswith("model.layers.1.") and "experts" in n}
    rest = {n: t for n, t in tensors.items() if not (n.startswith("model.layers.1.") and ".experts." in n)}
    save(tmp_path / "older", rest | taken)
    assert check(open_checkpoint(tmp_path / "older"), values=False).verdict


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("num_hidden_layers", {"num_hidden_layers": 2000}),
    "a billion layers": ("num_hidden_layers", {"num_hidden_layers": 10**9}),
    "more digits than a machine has": ("num_hidden_layers", {"num_hidden_layers": 10**30}),
    "experts": ("num_local_experts", {"model_type": "mixtral", "num_local_experts": 10**7}),
    "of a part": ("text_config.num_hidden_layers", {"text_config": {"num_hidden_layers": 5000}}),
    "by another name": ("n_layer", {"model_type": "gpt2", "n_layer": 5000}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_files_cannot_hold_is_reported_before_anything_is_built(
    qwen: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    folder, _ = qwen
    key, changes = HOSTILE[case]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    monkeypatch.setattr(architecture, "_look", lambda *_: pytest.fail("it was built"))
    report = check(open_checkpoint(folder), values=False)
    assert ("error", "config-layers", "config.json") in findings(report)
    assert report.held_against is None
    assert report.not_held.startswith(f"config.json: {key} is {next(iter(_numbers(changes)))}")


def _numbers(document: dict[str, Any]) -> Iterator[int]:
    for value in document.values():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield value


def test_a_model_that_grows_beyond_the_files_is_given_up(qwen: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """As one does whose count of layers stands under a name that nobody knows."""
    folder, tensors = qwen
    config = json.loads((folder / "config.json").read_text())
    large = {**config, "num_hidden_layers": 900, "layer_types": ["full_attention"] * 900}
    save(folder, {**tensors, **{f"x.{i}": torch.ones(1) for i in range(900)}})
    with pytest.raises(architecture.BeyondFiles, match="many more tensors than the 925 that there are"):
        architecture.find(large, open_checkpoint(folder), None)


def test_code_of_a_checkpoint_is_not_run(qwen: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = qwen
    config = json.loads((folder / "config.json").read_text())
    own = {**config, "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    report = check(open_checkpoint(folder), values=False)
    assert report.held_against is None
    assert "auto_map names Python files of its own, and code from checkpoints is never run" in report.not_held
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nobody"}, "transformers knows no model_type 'nobody'"),
        ({"num_attention_heads": "four"}, "transformers does not take its config.json"),
        ({"quantization_config": {"bits": 4}}, "quantization_config of no known method"),
        ({"architectures": ["Nobody", "AutoModel", 5]}, ""),
        ({"architectures": "Qwen3ForCausalLM"}, ""),
    ],
)
def test_what_is_not_held_says_why(
    qwen: tuple[Path, dict[str, torch.Tensor]], changes: dict[str, Any], reason: str
) -> None:
    folder, _ = qwen
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    report = check(open_checkpoint(folder), values=False)
    assert reason in report.not_held
    assert (report.held_against is None) == bool(reason)


def test_parts_of_quantised_weights_stand_for_them(qwen: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Scales are no strangers, and packed weights have the shapes that they stand for; what is missing is missed."""
    folder, tensors = qwen
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    up = "model.layers.0.mlp.up_proj.weight"
    tensors[up] = tensors[up].to(torch.float8_e4m3fn)
    tensors[f"{up}_scale_inv"] = torch.ones(1, 1)
    del tensors["model.norm.weight"]
    save(folder, tensors)
    assert findings(check(open_checkpoint(folder), values=False)) == [("error", "missing", "model.norm.weight")]


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "qwen2", "gpt_neox", "mixtral"])
def test_models_quantised_by_gptq_are_held_as_what_they_stand_for(tmp_path: Path, kind: str) -> None:
    save_tiny(tmp_path / "full", kind)
    weightops.quantize(tmp_path / "full", tmp_path / "quantized", method="rtn", group_size=32, mse=False)
    report = check(open_checkpoint(tmp_path / "quantized"), values=False)
    assert findings(report) == []
    assert report.held_against is not None
    path = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(path)
    module = next(name for name in tensors if name.endswith(".qweight")).removesuffix("qweight")
    parts = {f"{module}{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    save_file({n: t for n, t in tensors.items() if n not in parts}, path, metadata={"format": "pt"})
    expected = [("error", "missing", f"{module}weight")]
    assert findings(check(open_checkpoint(tmp_path / "quantized"), values=False)) == expected


def test_biases_of_zeros_of_quantised_layers_are_no_finding(tmp_path: Path) -> None:
    quantize_tiny(make_qwen3(tmp_path / "full"), tmp_path / "quantized")
    path = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(path)
    biases = {f"{n[:-7]}bias": torch.zeros(t.shape[1]).half() for n, t in tensors.items() if n.endswith(".qweight")}
    save_file(tensors | biases, path, metadata={"format": "pt"})
    assert [f for f in findings(check(open_checkpoint(path.parent))) if f[1] != "quantization"] == []
    name = "model.layers.1.mlp.up_proj.bias"
    biases[name][3] = 1
    save_file(tensors | biases, path, metadata={"format": "pt"})
    assert ("warning", "unexpected", name) in findings(check(open_checkpoint(path.parent)))


def make_qwen3(folder: Path) -> Path:
    settings = {**CONFIGS["llama"], "head_dim": 16}
    save_tiny(folder, "qwen3", **settings)
    return folder


def test_what_was_found_is_kept_under_the_config_s_digest(
    qwen: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = qwen
    checkpoint, cache = open_checkpoint(folder), folder / "deep" / "cache"
    config = checkpoint.config()
    first = architecture.find(config, checkpoint, cache)
    (kept,) = cache.iterdir()
    looked: list[int] = []

    def look(*given: Any, look: Callable[..., Any] = architecture._look) -> Any:
        looked.append(1)
        return look(*given)

    monkeypatch.setattr(architecture, "_look", look)
    assert architecture.find({**config, "transformers_version": "4.0", "dtype": "float16"}, checkpoint, cache) == first
    assert looked == []
    whole = kept.read_bytes()
    for damaged in (b"", whole[:100], b"[]", whole.replace(b"[", b"{"), b"\xff" * 9, b"[" * 100_000):
        kept.write_bytes(damaged)
        assert architecture.find(config, checkpoint, cache) == first
        assert kept.read_bytes() == whole
    assert len(looked) == 6
    architecture.find({**config, "num_hidden_layers": 1, "layer_types": ["full_attention"]}, checkpoint, cache)
    monkeypatch.setattr(architecture, "library_versions", lambda: {"transformers": "6"})
    architecture.find(config, checkpoint, cache)
    assert len(looked) == 8
    assert len(list(cache.iterdir())) == 3


def test_a_cache_that_cannot_be_written_or_read_changes_nothing(qwen: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = qwen
    checkpoint = open_checkpoint(folder)
    (folder / "file").write_text("")
    for cache in (folder / "file", folder / "file" / "below", Path("/proc/weightops")):
        assert architecture.find(checkpoint.config(), checkpoint, cache).name == "Qwen3ForCausalLM"
    cache = folder / "cache"
    architecture.find(checkpoint.config(), checkpoint, cache)
    (kept,) = cache.iterdir()
    kept.unlink()
    kept.mkdir()
    assert architecture.find(checkpoint.config(), checkpoint, cache).name == "Qwen3ForCausalLM"


def test_the_command_keeps_it_in_the_user_s_cache_and_says_what_was_done(
    qwen: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tensors = qwen
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    by = f"Qwen3ForCausalLM of transformers {transformers.__version__}"
    shown = CliRunner().invoke(cli, ["check", str(folder), "--quiet", "--json"])
    assert json.loads(shown.stdout)["architecture"] == {"held_against": by, "not_held": None}
    assert len(list((folder / "cache" / "weightops" / "architectures").iterdir())) == 1
    # A second check imports neither transformers nor torch, and finds the same.
    del tensors["model.embed_tokens.weight"]
    save(folder, tensors)
    script = """
import sys
from weightops.cli.main import run
assert run(["check", sys.argv[1], "--strict", "--quiet"]) == 3
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "1 tensor of Qwen3ForCausalLM is missing: model.embed_tokens.weight" in done.stdout
    assert f"; held against {by})" in done.stdout
    shown = CliRunner().invoke(cli, ["check", str(folder), "--no-architecture", "--html", str(folder / "p.html")])
    assert "held against no architecture: it was not to be (--no-architecture)" in shown.stdout
    assert "held against none: it was not to be (--no-architecture)" in (folder / "p.html").read_text()
    assert by in page(check(open_checkpoint(folder), values=False)).decode()


def test_without_a_cache_folder_there_is_no_cache(
    qwen: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = qwen
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert CliRunner().invoke(cli, ["check", str(folder), "--quiet"]).exit_code == 0
    assert len(list((folder / "home" / ".cache" / "weightops" / "architectures").iterdir())) == 1


def test_a_checkpoint_without_tensors_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, {})
    for config in ({}, {"model_type": "llama"}, {"model_type": "nobody"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert ("error", "missing", tmp_path.name) in findings(check(open_checkpoint(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert findings(check(open_checkpoint(tmp_path))) == [("error", "missing", tmp_path.name)]
