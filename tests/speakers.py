"""Models that say what they are told to, with tokenizers that spell characters in bytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from small_tokenizers import training_text
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(model: Any, pre_tokenizer: Any, decoder: Any, trainer: Any, normalizer: Any = None, **settings: Any) -> Any:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator(training_text()[:300], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **settings)


def byte_fallback() -> Any:
    """As LLaMA's and Mistral's are."""
    made = fast(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        None,
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL + BYTES, limit_alphabet=60, show_progress=False, max_token_length=8
        ),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    document = json.loads(made.backend_tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def speaker(folder: Path, tokenizer: Any, tokens: list[int]) -> None:
    """A model that says these tokens, each of which has one successor; and the tokenizer."""
    size = max(len(tokenizer), 320) // 4 * 4 + 4
    config = LlamaConfig(
        hidden_size=size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=size,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for token, following in itertools.pairwise(tokens):
            model.lm_head.weight[following, token] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def speaker_of_chinese(folder: Path) -> list[int]:
    """A model with byte fallback that says "偂惄煆t" after "一", into a folder; the tokens that it says."""
    tokenizer = byte_fallback()
    prompt = tokenizer("一", add_special_tokens=False).input_ids
    tokens = [
        *tokenizer("一偂惄煆", add_special_tokens=False).input_ids,
        *tokenizer.convert_tokens_to_ids(["t", "</s>"]),
    ]
    assert len(set(tokens)) == len(tokens)
    speaker(folder, tokenizer, tokens)
    return tokens[len(prompt) :]
