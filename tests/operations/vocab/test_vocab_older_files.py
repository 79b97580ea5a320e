"""Folders of before tokenizer.json, or with the same in other files: written anew, or left out and named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tokenizer_folders import Files, bpe, dumped
from transformers import AutoTokenizer
from vocabularies import CORPUS, bert, matrices, spm_unigram, write_model

import weightops


def gpt2(*, both: bool = False) -> Files:
    """vocab.json and merges.txt, which have added tokens among the others unless a tokenizer.json has them."""
    files = bpe("gpt-2")
    document = json.loads(files["tokenizer.json"])
    model = document["model"]
    added = {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    files["vocab.json"] = dumped(model["vocab"] if both else {**model["vocab"], **added})
    files["merges.txt"] = f"#version: 0.2\n{merges}".encode()
    files["tokenizer_config.json"] = dumped({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    return files if both else {name: data for name, data in files.items() if name != "tokenizer.json"}


def pieces(name: str, pad_id: int = -1, **config: object) -> Files:
    files = spm_unigram(byte_fallback=False, pad_id=pad_id)
    files["tokenizer_config.json"] = dumped(config)
    files[name] = files.pop("tokenizer.model")
    return files


def t5() -> Files:
    roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return pieces("spiece.model", 3, tokenizer_class="T5Tokenizer", extra_ids=10, **roles)


def xlm_roberta() -> Files:
    """Whose ids are not those of its pieces."""
    return pieces("sentencepiece.bpe.model", tokenizer_class="XLMRobertaTokenizer")


def old_bert() -> Files:
    return {name: data for name, data in bert().items() if name != "tokenizer.json"}


KINDS: Mapping[str, tuple[Callable[[], Files], int, set[str]]] = {
    "GPT-2": (gpt2, 902, set()),
    "GPT-2 with tokenizer.json": (lambda: gpt2(both=True), 902, set()),
    "BERT": (old_bert, 900, set()),
    "T5": (t5, 910, set()),
    "XLM-R": (xlm_roberta, 902, {"sentencepiece.bpe.model"}),
}
"""By name: the files, the tokens that transformers makes of them, and which files go."""


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_older_folders_are_trimmed_and_added_to(name: str, tmp_path: Path) -> None:
    make, count, gone = KINDS[name]
    files = make()
    source = write_model(tmp_path / "model", files, rows=count + 6)
    (tmp_path / "corpus.txt").write_text(CORPUS)
    said = weightops.vocab(source, tmp_path / "out", trim=tmp_path / "corpus.txt").warnings
    before, after = (AutoTokenizer.from_pretrained(tmp_path / each) for each in ("model", "out"))
    assert [before.tokenize(line) for line in CORPUS.splitlines()] == list(map(after.tokenize, CORPUS.splitlines()))
    old, new = before.get_vocab(), after.get_vocab()
    assert sorted(new.values()) == list(range(len(new)))
    tensors, originals = matrices(tmp_path / "out"), matrices(source)
    for matrix in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(tensors[matrix][list(new.values())], originals[matrix][[old[text] for text in new]])
    assert {each for each in files if not (tmp_path / "out" / each).exists()} == gone
    assert all(any(each in text for text in said) for each in gone)
    weightops.vocab(source, tmp_path / "more", add_token="<|stop|>", ends_turn=True)
    more = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert more.eos_token_id == more.convert_tokens_to_ids("<|stop|>") == count
    assert count in more("a<|stop|>")["input_ids"]
