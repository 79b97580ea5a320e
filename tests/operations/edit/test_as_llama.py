"""Models of other families as Llama: the same answers to the bit where nothing is rounded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import weightops
from weightops.errors import UsageError

IDS = torch.tensor([[3, 5, 9, 17, 33]])
Tensors = dict[str, torch.Tensor]


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    tiny(kind, **{**COMMON, **FAMILIES.get(kind, {}), **changes}).save_pretrained(folder)
    return folder


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True}),
        ("phi3", {}),
    ],
)
def test_answers_are_the_same_to_the_bit(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = saved(kind, tmp_path / "model", **changes)
    weightops.convert(source, tmp_path / "out", to="llama")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), LlamaForCausalLM)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(tmp_path / "out", dtype), logits(source, dtype))


MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
    "logits_scaling": 8.0,
}
POWERS = {"embedding_multiplier": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 8.0}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multipliers", [MULTIPLIERS, POWERS], ids=["rounded", "powers of two"])
def test_the_multipliers_of_granite_are_in_the_weights(
    multipliers: dict[str, float], tied: bool, tmp_path: Path
) -> None:
    source = saved("granite", tmp_path / "model", tie_word_embeddings=tied, **multipliers)
    result = weightops.convert(source, tmp_path / "out", to="llama")
    before = logits(source)
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=0, atol=4e-6 * float(before.abs().max()))
    said = "exactly, being powers of two" if multipliers is POWERS else "rounded once more"
    assert any(said in warning for warning in result.warnings)
    assert "embedding_multiplier" not in json.loads((tmp_path / "out" / "config.json").read_text())


class TestOfPublishedCode:
    """InternLM2, Baichuan, Qwen and MiniCPM come with code of their own: here made of a Llama as it reads them."""

    @pytest.fixture
    def llama(self, tmp_path: Path) -> tuple[Tensors, dict[str, Any]]:
        source = saved("llama", tmp_path / "llama", attention_bias=False)
        return load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())

    def write(self, folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
        folder.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_own.py").write_text("raise SystemExit")
        return folder

    def test_internlm2(self, llama: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
        tensors, config = llama
        made = {}
        names = {"o_proj": "attention.wo", "gate_proj": "feed_forward.w1", "up_proj": "feed_forward.w3"}
        names |= {"down_proj": "feed_forward.w2"}
        norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
        for name, tensor in tensors.items():
            stem = name.rsplit(".", 2)
            if stem[-2] in names:
                made[f"{'.'.join(name.split('.')[:3])}.{names[stem[-2]]}.weight"] = tensor
            elif stem[-2] in norms:
                made[f"{stem[0]}.{norms[stem[-2]]}.weight"] = tensor
            elif stem[-2] == "q_proj":
                q, k, v = (tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv")
                # for each of two heads of k: the two heads of q that look at it, k, v
                rows = [
                    part
                    for g in range(2)
                    for part in (q[32 * g : 32 * g + 32], k[16 * g : 16 * g + 16], v[16 * g : 16 * g + 16])
                ]
                made[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
            elif "proj" not in name:
                made[name.replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")] = tensor
        own = {**config, "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
        source = self.write(tmp_path / "own", made, {**own, "auto_map": {"AutoModel": "modeling_own.Model"}})
        weightops.convert(source, tmp_path / "out", to="llama")
        self.is_llama(tmp_path / "out", tensors)

    def test_baichuan(self, llama: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
        tensors, config = llama
        wide = {n: torch.cat([t, t + 1]) if ".k_proj" in n or ".v_proj" in n else t for n, t in tensors.items()}
        made = {n: t for n, t in wide.items() if not any(f".{x}_proj" in n for x in "qkv")}
        for layer in range(4):
            stem = f"model.layers.{layer}.self_attn"
            made[f"{stem}.W_pack.weight"] = torch.cat([wide[f"{stem}.{x}_proj.weight"] for x in "qkv"])
        own = {**config, "model_type": "baichuan", "num_key_value_heads": 4, "z_loss_weight": 0}
        source = self.write(tmp_path / "own", made, {**own, "auto_map": {"AutoModel": "modeling_own.Model"}})
        weightops.convert(source, tmp_path / "out", to="llama")
        head = torch.nn.functional.normalize(wide["lm_head.weight"])
        found = load_file(tmp_path / "out" / "model.safetensors")
        torch.testing.assert_close(found["lm_head.weight"], head, rtol=1e-6, atol=1e-8)
        self.is_llama(tmp_path / "out", {**wide, "lm_head.weight": found["lm_head.weight"]})

    def test_qwen(self, llama: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
        tensors, _ = llama
        wide = {n: torch.cat([t, t + 1]) if ".k_proj" in n or ".v_proj" in n else t for n, t in tensors.items()}
        names = {"embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
        made = {}
        for old, new in names.items():
            name = next(n for n in wide if f"{old}.weight" in n)
            made[f"{new}.weight"] = wide[name]
        parts = {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.w1", "mlp.gate_proj": "mlp.w2"}
        parts |= {"mlp.down_proj": "mlp.c_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
        wanted = dict(wide)
        for layer in range(4):
            old, new = f"model.layers.{layer}", f"transformer.h.{layer}"
            made |= {f"{new}.{b}.weight": wide[f"{old}.{a}.weight"] for a, b in parts.items()}
            biases = torch.arange(192.0)
            made[f"{new}.attn.c_attn.weight"] = torch.cat([wide[f"{old}.self_attn.{x}_proj.weight"] for x in "qkv"])
            made[f"{new}.attn.c_attn.bias"] = biases
            wanted |= {f"{old}.self_attn.{x}_proj.bias": b for x, b in zip("qkv", biases.chunk(3), strict=True)}
            wanted[f"{old}.self_attn.o_proj.bias"] = torch.zeros(64)
        own = {
            "model_type": "qwen",
            "vocab_size": 320,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "layer_norm_epsilon": 1e-6,
            "rotary_emb_base": 10000,
            "seq_length": 128,
            "use_dynamic_ntk": True,
            "auto_map": {"AutoModel": "modeling_own.Model"},
        }
        result = weightops.convert(self.write(tmp_path / "own", made, own), tmp_path / "out", to="llama")
        self.is_llama(tmp_path / "out", wanted)
        assert any("alike up to 128 tokens" in warning for warning in result.warnings)

    def test_minicpm(self, llama: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
        tensors, config = llama
        own = {**config, "model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
        tied = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
        source = self.write(tmp_path / "own", tied, {**own, "tie_word_embeddings": True})
        weightops.convert(source, tmp_path / "out", to="llama")
        found = load_file(tmp_path / "out" / "model.safetensors")
        embedding = tensors["model.embed_tokens.weight"]
        assert torch.equal(found["model.embed_tokens.weight"], embedding * 12)
        assert torch.equal(found["lm_head.weight"], embedding * 0.25)
        name = "model.layers.1.mlp.down_proj.weight"
        torch.testing.assert_close(found[name], tensors[name] * (1.4 / math.sqrt(4)), rtol=1e-6, atol=0)

    def is_llama(self, folder: Path, wanted: Tensors) -> None:
        found = load_file(folder / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert [n for n in found if not torch.equal(found[n], wanted[n])] == []
        assert not list(folder.glob("*.py"))
        assert isinstance(AutoModelForCausalLM.from_pretrained(folder), LlamaForCausalLM)


class TestRefused:
    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            ("llama", {}, "is a Llama already"),
            ("qwen3", {}, "q and k have norms"),
            ("gemma2", {}, "embeddings are scaled"),
            ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
            ("mistral", {"sliding_window": 8}, "attention slides in a window of 8 tokens, and the context is 128"),
        ],
    )
    def test_what_is_no_llama(self, kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=message):
            weightops.convert(saved(kind, tmp_path / "model", **changes), tmp_path / "out", to="llama")
        assert not (tmp_path / "out").exists()

    def test_a_window_is_long_enough_for_shorter_texts(self, tmp_path: Path) -> None:
        source = saved("mistral", tmp_path / "model", sliding_window=8)
        weightops.convert(source, tmp_path / "out", to="llama", set={"context_length": "8"})
        assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 8
        assert torch.equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize("gone", [("rms_norm_eps",), ("rope_theta", "rope_parameters", "rope_scaling")])
@pytest.mark.parametrize("kind", ["mistral", "phi3", "granite"])
def test_what_a_class_takes_for_granted_is_written(kind: str, gone: tuple[str, ...], tmp_path: Path) -> None:
    source = saved(kind, tmp_path / "model", sliding_window=None)
    path = source / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in gone}))
    weightops.convert(source, tmp_path / "out", to="llama")
    assert torch.equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize("value", [float("inf"), -1.0])
def test_a_factor_that_is_none(value: float, tmp_path: Path) -> None:
    source = saved("granite", tmp_path / "model")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "embedding_multiplier": value}))
    with pytest.raises(UsageError, match="expected a number above zero"):
        weightops.convert(source, tmp_path / "out", to="llama")
    assert not (tmp_path / "out").exists()
