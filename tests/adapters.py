"""Small models and adapters made with peft, and what peft itself makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from weightops.engine.control import Control
from weightops.engine.values import values
from weightops.lazy import Evaluate

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
PeftModel.create_or_update_model_card = lambda *_: None  # no test reads it, and filling in its template takes long

State = dict[str, torch.Tensor]
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
MOE = {"hidden_size": 64, "intermediate_size": 112, "num_experts_per_tok": 2, **SMALL}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def quietly() -> Iterator[None]:
    """Without what peft and transformers warn of, and with one thread: elsewhere more of them make other bits."""
    threads, offline = torch.get_num_threads(), constants.HF_HUB_OFFLINE
    torch.set_num_threads(1)
    constants.HF_HUB_OFFLINE = True  # peft asks the hub about the base, of which it has only a path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        constants.HF_HUB_OFFLINE = offline


def llama(**changes: Any) -> PretrainedConfig:
    """A LLaMA of two layers, none of whose sizes is a multiple of 64 but one."""
    sizes = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 2, "vocab_size": 101}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return AutoConfig.for_model("llama", **{**sizes, **heads, "tie_word_embeddings": False, **changes})


def config_of(kind: str) -> PretrainedConfig:
    """The config of a small model of this kind."""
    match kind:
        case "tied":
            return llama(tie_word_embeddings=True)
        case "biased":
            return llama(attention_bias=True)
        case "gpt2":
            return AutoConfig.for_model("gpt2", n_embd=64, n_layer=1, n_head=4, vocab_size=99, n_positions=32)
        case "phi3":
            return AutoConfig.for_model("phi3", hidden_size=64, intermediate_size=112, pad_token_id=0, **SMALL)
        case "gpt_neox":
            return AutoConfig.for_model("gpt_neox", hidden_size=64, intermediate_size=112, **SMALL)
        case "mixtral":
            return AutoConfig.for_model("mixtral", num_local_experts=4, **MOE)
        case "qwen3_moe":
            return AutoConfig.for_model("qwen3_moe", num_experts=4, moe_intermediate_size=48, head_dim=16, **MOE)
        case "gpt_oss":
            return AutoConfig.for_model("gpt_oss", num_local_experts=4, head_dim=16, **{**MOE, "intermediate_size": 64})
        case "phimoe":
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_experts_per_tok": 2, **SMALL}
            return AutoConfig.for_model("phimoe", num_local_experts=4, **sizes)
        case "llava" | "gemma3" | "qwen2_vl":
            return _vision_config(kind)
        case _:
            return llama()


def _vision_config(kind: str) -> PretrainedConfig:
    """A small model of pictures and text, whose parts files and transformers call otherwise."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, **SMALL}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    pictures = {"image_size": 16, "patch_size": 8}
    if kind == "qwen2_vl":
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
        return AutoConfig.for_model(kind, text_config={**sizes, "rope_parameters": rope}, vision_config=vision)
    if kind == "gemma3":
        text = AutoConfig.for_model("gemma3_text", head_dim=8, **sizes)
        vision = {"model_type": "siglip_vision_model", **tower, **pictures}
        return AutoConfig.for_model(kind, text_config=text, vision_config=vision, mm_tokens_per_image=4)
    text, vision = AutoConfig.for_model("llama", **sizes), {"model_type": "clip_vision_model", **tower, **pictures}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision)


def save_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A random model as transformers saves it."""
    with quietly():
        torch.manual_seed(seed)
        _auto(config).from_config(config).to(dtype).save_pretrained(folder)
    return folder


def load_model(folder: Path) -> Any:
    with quietly():
        return _auto(AutoConfig.from_pretrained(folder)).from_pretrained(folder)


def _auto(config: PretrainedConfig) -> Any:
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def save_adapter(
    folder: Path, base: Path, seed: int = 1, rows: int | None = None, dtype: torch.dtype | None = None, **lora: Any
) -> Path:
    """A random adapter as peft saves it, trained on `base` with `rows` tokens; in `dtype` if that is given."""
    with quietly():
        torch.manual_seed(seed)
        model = load_model(base)
        if rows is not None:
            model.resize_token_embeddings(rows)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
        tuned = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **settings, **lora}))
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                scale = 0.3 if "lora_" in name else 0.02
                parameter.data += torch.randn_like(parameter) * (0.1 if "magnitude" in name else scale)
        tuned.save_pretrained(folder)
    if dtype is not None:
        path = folder / "adapter_model.safetensors"
        save_file({n: t.to(dtype) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def merged_by_peft(
    base: Path,
    adapters: Sequence[Path],
    out: Path,
    weights: Sequence[float] = (),
    safe: bool = False,
    rows: int | None = None,
) -> tuple[State, dict[str, Any]]:
    """What peft merges and transformers saves: tensors, and config.json."""
    with quietly():
        model = load_model(base)
        if rows is not None:
            model.resize_token_embeddings(rows)
        names = [f"a{i}" for i in range(len(adapters))]
        tuned = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
        for name, folder in list(zip(names, adapters, strict=True))[1:]:
            tuned.load_adapter(folder, adapter_name=name)
        for name, weight in zip(names, weights, strict=False):
            for module in tuned.modules():
                if isinstance(module, LoraLayer):
                    module.set_scale(name, weight)
        merged = tuned.merge_and_unload(safe_merge=safe, adapter_names=names)
        merged.save_pretrained(out)
    return state(out), json.loads((out / "config.json").read_text())


def state(folder: Path) -> State:
    """All tensors of a folder of safetensors files."""
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


class Made:
    """Models and adapters, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Path] = {}

    def _once(self, key: str, make: Any) -> Path:
        if key not in self._known:
            self._known[key] = make(self._folder / str(len(self._known)))
        return self._known[key]

    def base(self, kind: str = "llama", dtype: str = "fp32") -> Path:
        return self._once(f"{kind} {dtype}", lambda path: save_model(path, config_of(kind), DTYPES[dtype]))

    def adapter(self, kind: str = "llama", **settings: Any) -> Path:
        base = self.base(kind)
        return self._once(f"{kind} {settings}", lambda path: save_adapter(path, base, **settings))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change adapter_config.json; None takes a setting out."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder: Path, edit: Any) -> None:
    """Change the tensors of an adapter: `edit` takes and gives a state dict."""
    path = folder / "adapter_model.safetensors"
    save_file({n: t.clone().contiguous() for n, t in edit(load_file(path)).items()}, path, metadata={"format": "pt"})


evaluate: Evaluate = lambda tensors: values(tensors, Control())  # noqa: E731
