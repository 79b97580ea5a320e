"""Models with tokenizers of the kinds that people have, whose vocabulary is to change."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from small_tokenizers import sentencepiece_model, training_text
from support import write_checkpoint
from tokenizer_folders import Files, dumped, llama3, qwen, spm, spm_both, spm_chatml, spm_converted
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WIDTH = 8
CORPUS = "".join(f"{line}\n" for line in training_text()[30:90])


@functools.cache
def word_pieces() -> str:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(training_text()[:600], trainer)
    cls, sep = (tokenizer.token_to_id(text) for text in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return str(tokenizer.to_str())


@functools.cache
def unigram() -> str:
    """T5's kind, with a token that ends texts and two that are added behind a gap-less vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(training_text()[:600], trainer)
    tokenizer.add_special_tokens(["<extra_0>", "<extra_1>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return str(tokenizer.to_str())


def bert() -> Files:
    config = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "pad_token": "[PAD]", "sep_token": "[SEP]"}
    vocabulary = json.loads(word_pieces())["model"]["vocab"]
    return {
        "tokenizer.json": word_pieces().encode(),
        "tokenizer_config.json": dumped({**config, "cls_token": "[CLS]", "mask_token": "[MASK]"}),
        "vocab.txt": "".join(f"{text}\n" for text in sorted(vocabulary, key=vocabulary.__getitem__)).encode(),
        "config.json": dumped({"pad_token_id": vocabulary["[PAD]"], "eos_token_id": vocabulary["[SEP]"]}),
    }


def t5() -> Files:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    return {
        "tokenizer.json": unigram().encode(),
        "tokenizer_config.json": dumped({**config, "unk_token": "<unk>", "extra_special_tokens": ["<extra_0>"]}),
        "spiece.model": b"of another making",
        "config.json": dumped({"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}),
    }


def spm_unigram(**changed: object) -> Files:
    """tokenizer.model of a kind that takes the best path, as XGLM's and many of Japanese have it."""
    files = spm()
    files["config.json"] = dumped({"bos_token_id": 1, "eos_token_id": 2})
    config = {**json.loads(files["tokenizer_config.json"]), "tokenizer_class": "PreTrainedTokenizerFast"}
    files["tokenizer_config.json"] = dumped(config)
    return {**files, "tokenizer.model": sentencepiece_model(model_type="unigram", vocab_size=900, **changed)}


KINDS: Mapping[str, Callable[[], Files]] = {
    "byte BPE": qwen,
    "ranks": llama3,
    "BPE of pieces": spm_converted,
    "WordPiece": bert,
    "Unigram": t5,
    "sentencepiece BPE": spm,
    "sentencepiece BPE with added tokens": spm_chatml,
    "sentencepiece BPE and tokenizer.json": spm_both,
    "sentencepiece Unigram": functools.partial(spm_unigram, byte_fallback=True),
    "sentencepiece Unigram without bytes": functools.partial(spm_unigram, byte_fallback=False),
}


def count(files: Files) -> int:
    """One more than the highest id, as the libraries have it."""
    if "tokenizer.json" in files:
        return max(Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab().values()) + 1
    added = json.loads(files.get("added_tokens.json", b"{}")).values()
    return max([SentencePieceProcessor(model_proto=files["tokenizer.model"]).vocab_size() - 1, *added]) + 1


def write_model(
    folder: Path, files: Files, *, padding: int = 6, tied: bool = False, rows: int | None = None, **config: Any
) -> Path:
    """A LLaMA without layers, whose rows are all different, with these files; more rows than tokens."""
    rows = count(files) + padding if rows is None else rows
    generator = torch.Generator().manual_seed(rows)
    shapes = {"model.embed_tokens.weight": (rows, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (rows, WIDTH)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    stated = json.loads(files.get("config.json", b"{}"))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 0}
    about = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied, "dtype": "bfloat16", **sizes}
    write_checkpoint(folder, tensors, {**about, **stated, "vocab_size": rows, **config})
    for name, data in files.items():
        if name != "config.json":
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def document(folder: Path, name: str) -> Any:
    """A JSON file of a folder."""
    return json.loads((folder / name).read_text())


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
