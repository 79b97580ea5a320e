"""Models of many families, whose tensors and settings have other names: padded, given tokens, and trimmed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from tiny_models import save_tokenizer

import weightops

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
BASE: dict[str, Any] = {
    **{"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
    **{**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
BERT: dict[str, Any] = {**SIZES, "vocab_size": 320, "max_position_embeddings": 64}
VISION = {**SIZES, "hidden_size": 16, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
GPT: dict[str, Any] = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
SIDES: dict[str, Any] = {
    **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (("layers", 1), ("ffn_dim", 48))},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "vocab_size": 320},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 1},
}
T5: dict[str, Any] = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
GEMMA3N: dict[str, Any] = {
    **{**BASE, "head_dim": 8, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    **{"num_kv_shared_layers": 0, "layer_types": ["full_attention"], "activation_sparsity_pattern": [0.0]},
    "altup_num_inputs": 2,
}
DISTIL: dict[str, Any] = {"vocab_size": 320, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4}
WHISPER: dict[str, Any] = {"suppress_tokens": [5], "begin_suppress_tokens": [6]}
MAMBA: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
Made = Callable[[], Any]
MODELS: Mapping[str, tuple[type[Any], Made]] = {
    "bart": (T.BartForConditionalGeneration, lambda: T.BartConfig(**SIDES, forced_eos_token_id=1)),
    "bert": (T.BertForMaskedLM, lambda: T.BertConfig(**BERT)),
    "bloom": (T.BloomForCausalLM, lambda: T.BloomConfig(vocab_size=320, hidden_size=32, n_layer=1, n_head=4)),
    "cohere": (T.CohereForCausalLM, lambda: T.CohereConfig(**BASE)),
    "distilbert": (T.DistilBertForMaskedLM, lambda: T.DistilBertConfig(**DISTIL)),
    "falcon": (T.FalconForCausalLM, lambda: T.FalconConfig(vocab_size=320, **SIZES)),
    "gemma3": (T.Gemma3ForCausalLM, lambda: T.Gemma3TextConfig(**BASE, head_dim=8)),
    "gemma3n": (T.Gemma3nForCausalLM, lambda: T.Gemma3nTextConfig(**GEMMA3N)),
    "gemma3 with images": (
        T.Gemma3ForConditionalGeneration,
        lambda: T.Gemma3Config(
            text_config={**BASE, "head_dim": 8}, vision_config=VISION, image_token_index=290, boi_token_index=291,
            eoi_token_index=292, mm_tokens_per_image=4,
        ),
    ),
    "gpt2": (T.GPT2LMHeadModel, lambda: T.GPT2Config(**GPT)),
    "gpt_neox": (T.GPTNeoXForCausalLM, lambda: T.GPTNeoXConfig(**BERT, bos_token_id=0, eos_token_id=1)),
    "gptj": (T.GPTJForCausalLM, lambda: T.GPTJConfig(**GPT, rotary_dim=4)),
    "mamba": (T.MambaForCausalLM, lambda: T.MambaConfig(**MAMBA)),
    "mistral3": (
        T.Mistral3ForConditionalGeneration,
        lambda: T.Mistral3Config(
            text_config={"model_type": "mistral", **BASE, "head_dim": 8},
            vision_config={"model_type": "pixtral", **VISION},
            image_token_index=290,
        ),
    ),
    "opt": (T.OPTForCausalLM, lambda: T.OPTConfig(**BASE | {"pad_token_id": 1}, ffn_dim=48, word_embed_proj_dim=32)),
    "phi": (T.PhiForCausalLM, lambda: T.PhiConfig(**BASE)),
    "phi3": (T.Phi3ForCausalLM, lambda: T.Phi3Config(**BASE)),
    "qwen2": (T.Qwen2ForCausalLM, lambda: T.Qwen2Config(**BASE, tie_word_embeddings=True)),
    "roberta": (T.RobertaForMaskedLM, lambda: T.RobertaConfig(**BERT)),
    "t5": (T.T5ForConditionalGeneration, lambda: T.T5Config(**T5, decoder_start_token_id=0)),
    "whisper": (T.WhisperForConditionalGeneration, lambda: T.WhisperConfig(**SIDES, **WHISPER)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_padded_and_trimmed_it_loads_and_says_the_same(name: str, tmp_path: Path) -> None:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config()).eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("merging the weights\n")
    options = {"add_token": ["<|im_start|>", "<|im_end|>"], "ends_turn": True, "rows": 384}
    weightops.vocab(tmp_path / "model", tmp_path / "padded", **options)
    weightops.vocab(tmp_path / "model", tmp_path / "trimmed", trim=tmp_path / "corpus.txt")
    before, after = (T.AutoTokenizer.from_pretrained(tmp_path / each) for each in ("model", "trimmed"))
    for folder in ("padded", "trimmed"):
        made, report = kind.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values()), report
        if name == "whisper":  # which hears, and reads no text
            continue
        texts = [tokenizer("merging the weights", return_tensors="pt")["input_ids"] for tokenizer in (before, after)]
        ids, own = texts[0], texts[1] if folder == "trimmed" else texts[0]
        more = [{"decoder_input_ids": each} if model.config.is_encoder_decoder else {} for each in (ids, own)]
        with torch.no_grad():
            theirs = model(input_ids=ids, **more[0]).logits
            found = made.eval()(input_ids=own, **more[1]).logits
        if folder == "padded":
            assert found.shape[-1] == 384
            assert torch.allclose(found[..., :320], theirs, atol=1e-6)
            continue
        # transformers gives some kinds a token of its own behind those of the files.
        kept = [text for text, i in sorted(after.get_vocab().items(), key=lambda item: item[1]) if i < found.shape[-1]]
        assert len(kept) == found.shape[-1] < 320
        assert torch.allclose(found, theirs[..., [before.get_vocab()[text] for text in kept]], atol=1e-6)
