"""Which tokenizer a folder holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from small_tokenizers import rank_tokens, render_ranks, sentencepiece_model

from weightops.errors import CorruptInput, UsageError
from weightops.layouts.tokenizers import ranks
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.layouts.tokenizers.hf import hf_files, special_ids
from weightops.layouts.tokenizers.read import read_tokenizer
from weightops.layouts.tokenizers.tokens import Tokenizer

RANKS = render_ranks(rank_tokens())


def read(files: dict[str, bytes], **given: Any) -> Tokenizer | None:
    return read_tokenizer(TokenizerFiles(files, "llama"), **{"generation": "3.1", "instruct": None, **given})


def test_the_kind_is_seen_from_tokenizer_model() -> None:
    found = read({"tokenizer.model": sentencepiece_model(), "tokenizer.json": b"not read"})
    assert found is not None
    assert (found.kind, found.data) == ("sentencepiece", sentencepiece_model())
    found = read({"tokenizer.model": RANKS}, generation="3.1", instruct=True)
    assert found == ranks.parse(RANKS, generation="3.1", instruct=True)
    assert read({"config.json": b"{}"}) is None


def test_what_a_rank_file_does_not_say_is_asked_for() -> None:
    with pytest.raises(UsageError, match="is an instruct one") as caught:
        read({"tokenizer.model": RANKS})
    assert caught.value.hint == "give --set instruct=true or --set instruct=false"


@pytest.mark.parametrize("instruct", [False, True])
def test_an_hf_folder_says_itself_what_ends_its_turns(instruct: bool) -> None:
    tokenizer = ranks.parse(RANKS, generation="3.1", instruct=instruct)
    files = {**hf_files(tokenizer, None), "generation_config.json": json.dumps(special_ids(tokenizer)).encode()}
    assert read(files) == tokenizer
    assert read(files, instruct=not instruct) == ranks.parse(RANKS, generation="3.1", instruct=not instruct)


def test_the_end_that_a_fine_tuned_model_has_chosen_is_kept() -> None:
    tokenizer = ranks.parse(RANKS, generation="3.1", instruct=False)
    files = hf_files(tokenizer, None)
    files["tokenizer_config.json"] = b'{"eos_token": {"content": "<|python_tag|>"}}'
    files["config.json"] = b'{"eos_token_id": 999999}'
    found = read(files)
    assert found is not None
    assert found.eos_ids == (tokenizer.eos_ids[0], len(rank_tokens()) + 10)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "this is a Git LFS pointer, not the tokenizer"),
        (b"\n<!DOCTYPE html><html>", "this is an HTML page"),
        (b"", "empty"),
        (b'{"error": "gated"}', "neither a sentencepiece model nor a list of ranks"),
        (b"A" * (1 << 25) + b"A", "33554433 bytes, at most 33554432 are read"),
    ],
)
def test_what_stands_in_for_a_tokenizer_is_refused(data: bytes, expected: str) -> None:
    with pytest.raises(CorruptInput, match=f"llama/tokenizer.model: {expected}"):
        read({"tokenizer.model": data})
