"""Tokenizers of the kinds that people have, as the files of Hugging Face folders."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from small_tokenizers import rank_tokens, render_ranks, sentencepiece_model, training_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from weightops.layouts.tokenizers import ranks, sentencepiece
from weightops.layouts.tokenizers.hf import hf_files
from weightops.layouts.tokenizers.pretokenizers import KNOWN

Files = dict[str, bytes]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
STARTS, ENDS = "<|im_start|>", "<|im_end|>"
PATTERNS = {name: patterns for patterns, name in KNOWN.items()}
TINY_LLAMA = Path(__file__).parent / "data/tiny-llama"


def dumped(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


def added(content: str, **changed: object) -> dict[str, object]:
    """A token as tokenizer_config.json has it."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": content, **flags, "special": True, **changed}


def spm(**config: Any) -> Files:
    """A sentencepiece model of 1,500 pieces, with what tokenizer_config.json says."""
    stated = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "tokenizer.model": sentencepiece_model(),
        "tokenizer_config.json": dumped({**stated, **config}),
        "config.json": dumped({"vocab_size": 1500, "bos_token_id": 1, "eos_token_id": 2}),
    }


def spm_chatml() -> Files:
    """A Mistral with ChatML's tokens and its own end, as of 2023: added_tokens.json lists all that are special."""
    tokens = {"</s>": 2, "<s>": 1, "<unk>": 0, ENDS: 1500, STARTS: 1501}
    decoder = {str(number): added(text) for text, number in tokens.items()}
    config = {"eos_token": ENDS, "pad_token": ENDS, "chat_template": CHATML, "added_tokens_decoder": decoder}
    files = spm(**config)
    files["config.json"] = dumped({"vocab_size": 1502, "bos_token_id": 1, "eos_token_id": 1500})
    return {**files, "added_tokens.json": dumped(tokens), "special_tokens_map.json": dumped({"eos_token": ENDS})}


def spm_alone() -> Files:
    """No more than config.json beside it, as of early 2023."""
    files = spm()
    del files["tokenizer_config.json"]
    return files


def spm_defined() -> Files:
    """Tokens that users define, one with sentencepiece's space, and a pad behind the rows of the embedding."""
    decoder = {"1500": added("\u2581fill\u2581in", special=False), "1501": added("<|tool|>", special=False)}
    tokens = {"\u2581fill\u2581in": 1500, "<|tool|>": 1501, "\u2581old": 1502, "[PAD]": 1510}
    files = spm(added_tokens_decoder=decoder, add_prefix_space=False, add_bos_token=True, add_eos_token=False)
    return {**files, "added_tokens.json": dumped(tokens), "chat_template.json": dumped({"chat_template": CHATML})}


def spm_both() -> Files:
    """LLaMA 2 as transformers 4 saves it, with a template for tools in a folder of its own."""
    more = {"additional_chat_templates/tool-use.jinja": b"tools: " + CHATML.encode()}
    return {**spm_converted(), **spm(add_bos_token=True), "chat_template.jinja": CHATML.encode(), **more}


def spm_converted(*, tokens: tuple[str, str] = (STARTS, ENDS)) -> Files:
    """The same with tokenizer.json alone, as transformers 5 saves it, and two tokens added to it."""
    files = hf_files(sentencepiece.parse(sentencepiece_model(), "tokenizer.model"), 2048)
    document = json.loads(files["tokenizer.json"])
    document["added_tokens"] += [{"id": 1500 + i, **added(text)} for i, text in enumerate(tokens)]
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": ENDS, "unk_token": "<unk>"}
    config |= {"extra_special_tokens": [STARTS]}
    return {
        "tokenizer.json": dumped(document),
        "tokenizer_config.json": dumped(config),
        "config.json": dumped({"bos_token_id": 1, "eos_token_id": [1501, 2]}),
        "chat_template.jinja": CHATML.encode(),
    }


def llama3() -> Files:
    """Llama 3.1 Instruct, with its three ends."""
    made = hf_files(ranks.parse(render_ranks(rank_tokens()), generation="3.1", instruct=True), 2048)
    first = len(rank_tokens())
    ends = [first + 1, first + 8, first + 9]
    return {
        **made,
        "config.json": dumped({"bos_token_id": first, "eos_token_id": ends}),
        "generation_config.json": dumped({"bos_token_id": first, "eos_token_id": ends}),
    }


def tiny_llama() -> Files:
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    return {name: (TINY_LLAMA / name).read_bytes() for name in names}


@functools.cache
def byte_level(*patterns: str) -> str:
    """tokenizer.json of a byte-level BPE that cuts texts by these patterns, trained here on words, code and Chinese."""
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == "single digits"
        else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if pattern.startswith("GPT-2")
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in patterns
    ]
    if not patterns[-1].startswith("GPT-2"):
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training_text()[:600], trainer)
    return str(tokenizer.to_str())


def bpe(pre: str, change: Callable[[Tokenizer], None] | None = None, **config: Any) -> Files:
    """A byte-level BPE of 900 tokens with <|endoftext|>, cut as `pre` says, changed, and with a config."""
    tokenizer = Tokenizer.from_str(byte_level(*PATTERNS[pre]))
    tokenizer.add_special_tokens(["<|endoftext|>", ENDS])
    if change:
        change(tokenizer)
    stated = {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": dumped({**stated, **config}),
        "config.json": dumped({"eos_token_id": 901}),
    }


def qwen() -> Files:
    """Qwen 2's kind: NFC, tokens that are not called special, and two templates by name in the config."""

    def change(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_tokens([AddedToken(STARTS, normalized=False), AddedToken("<tool\u00e9>", normalized=False)])
        tokenizer.add_tokens([AddedToken("un\u2581say", normalized=True)])

    templates = [{"name": "default", "template": CHATML}, {"name": "tool use", "template": "T" + CHATML}]
    return bpe("qwen2", change, eos_token=ENDS, pad_token="<|endoftext|>", bos_token=None, chat_template=templates)


def smollm() -> Files:
    """Digits one by one; the end named as an object, and a bos that the post-processor does not put."""
    return bpe("smollm", bos_token=added("<|endoftext|>"), eos_token=added(ENDS), unk_token="<|endoftext|>")


def tekken() -> Files:
    """Mistral Nemo's kind: bos and eos put around texts by a template."""

    def change(tokenizer: Tokenizer) -> None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"<|endoftext|> $A {ENDS}",
            pair=f"<|endoftext|> $A {ENDS} <|endoftext|> $B {ENDS}",
            special_tokens=[("<|endoftext|>", 900), (ENDS, 901)],
        )

    return bpe("tekken", change, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def roberta() -> Files:
    """RoBERTa's post-processor on GPT-2's BPE, its names in special_tokens_map.json and one more token there."""

    def change(tokenizer: Tokenizer) -> None:
        tokenizer.post_processor = processors.RobertaProcessing((ENDS, 901), ("<|endoftext|>", 900))

    files = bpe("gpt-2", change, cls_token="<|endoftext|>")
    return {**files, "special_tokens_map.json": dumped({"sep_token": ENDS, "mask_token": "<mask>"})}


def gpt4o() -> Files:
    """No tokenizer_config.json at all: ends come from config.json, and templates from nowhere."""
    files = bpe("gpt-4o")
    del files["tokenizer_config.json"]
    return {**files, "chat_template.jinja": CHATML.encode()}


def deepseek() -> Files:
    return bpe("deepseek-v3", bos_token="<|endoftext|>", add_bos_token=True, add_eos_token=False)


KINDS: Mapping[str, tuple[Callable[[], Files], str, int]] = {
    "sentencepiece with ChatML": (spm_chatml, "default", 1502),
    "sentencepiece alone": (spm_alone, "default", 1500),
    "sentencepiece with tokens of users": (spm_defined, "default", 1505),
    "sentencepiece and tokenizer.json": (spm_both, "default", 1502),
    "sentencepiece as tokenizer.json": (spm_converted, "default", 1502),
    "Llama 3.1": (llama3, "llama-bpe", len(rank_tokens()) + 256),
    "tiny-llama": (tiny_llama, "gpt-2", 2048),
    "Qwen 2": (qwen, "qwen2", 905),
    "SmolLM": (smollm, "smollm", 902),
    "Tekken": (tekken, "tekken", 902),
    "RoBERTa": (roberta, "gpt-2", 910),
    "GPT-4o": (gpt4o, "gpt-4o", 902),
    "DeepSeek V3": (deepseek, "deepseek-v3", 904),
}
"""By name: the files, the name of the pre-tokenizer, and rows of the embedding."""
