"""The tokenizer part of GGUF files against what llama.cpp's converter takes from the same folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from llama_cpp_rules import tokenizer_fields
from small_tokenizers import mixed_strings
from tokenizer_folders import ENDS, KINDS, STARTS, Files, bpe, dumped, qwen, spm, spm_both, spm_converted
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from weightops.errors import CorruptInput, UsageError, WeightopsError
from weightops.layouts.tokenizers import pretokenizers, sentencepiece
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.layouts.tokenizers.gguf import Vocabulary, vocabulary


def save(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def made(files: Files, rows: int) -> Vocabulary:
    return vocabulary(TokenizerFiles(files, "model"), rows)


def fields(files: Files, rows: int) -> dict[str, Any]:
    """The metadata as gguf's reader gives it."""
    result = {}
    for key, value in made(files, rows).metadata.items():
        ((kind, content),) = value.items()
        result[key] = content[1] if kind == "array" else content
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_those_of_the_converter(tmp_path: Path, kind: str) -> None:
    make, pre, rows = KINDS[kind]
    found, expected = fields(make(), rows), tokenizer_fields(save(make(), tmp_path), rows, pre)
    if kind == "sentencepiece as tokenizer.json":  # see below
        del found["tokenizer.ggml.scores"], expected["tokenizer.ggml.scores"]
    assert list(found) == list(expected)
    assert found == expected


@pytest.mark.parametrize(("kind", "rows"), [("sentencepiece alone", 32016), ("DeepSeek V3", 49152)])
def test_models_known_by_their_rows_get_what_the_converter_says_of_them(tmp_path: Path, kind: str, rows: int) -> None:
    make, pre, _ = KINDS[kind]
    assert fields(make(), rows) == tokenizer_fields(save(make(), tmp_path), rows, pre)


def test_scores_of_a_tokenizer_json_give_the_order_of_its_merges() -> None:
    """llama.cpp's converter gives all tokens one score, with which llama.cpp merges from left to right."""
    found = fields(spm_converted(), 1502)
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    merges = [pair.split(" ") for pair in json.loads(spm_converted()["tokenizer.json"])["model"]["merges"]]
    order = [scores[left + right] for left, right in merges]
    assert order == sorted(order, reverse=True)
    original = sentencepiece.parse(spm()["tokenizer.model"], "tokenizer.model").tokens
    normal = {token.data.decode(): token.score for token in original[259:]}
    assert {text: scores[text] for text in normal} == normal


def test_a_published_tokenizer_is_known_by_its_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = pretokenizers.CHECK_TEXT
    assert hashlib.sha256(text.encode()).hexdigest().startswith("a36179c1e2b1cfcfbfad1dc779addad2")
    tokens = str(AutoTokenizer.from_pretrained(save(qwen(), tmp_path)).encode(text))
    monkeypatch.setattr(pretokenizers, "DIGESTS", {hashlib.sha256(tokens.encode()).hexdigest(): "megrez"})
    assert fields(qwen(), 905)["tokenizer.ggml.pre"] == "megrez"


@pytest.mark.parametrize("bos", ["<|endoftext|>", {"content": "<|endoftext|>"}])
def test_bos_counts_as_the_config_says_it_is_put(monkeypatch: pytest.MonkeyPatch, bos: Any) -> None:
    """DeepSeek V3 and JoyAI differ in nothing else."""
    files = change(KINDS["DeepSeek V3"][0](), "tokenizer_config.json", bos_token=bos)
    plain = Tokenizer.from_str(files["tokenizer.json"].decode()).encode(pretokenizers.CHECK_TEXT).ids
    digests = {hashlib.sha256(str(ids).encode()).hexdigest(): str(ids[0]) for ids in ([900, *plain], plain)}
    monkeypatch.setattr(pretokenizers, "DIGESTS", digests)
    assert fields(files, 904)["tokenizer.ggml.pre"] == "900"
    without = change(files, "tokenizer_config.json", add_bos_token=False)
    assert fields(without, 904)["tokenizer.ggml.pre"] == str(plain[0])


def test_known_pre_tokenizers_cut_texts_in_different_ways() -> None:
    """No two names stand for the same, so that the one that is found is right."""
    cuts = set()
    for name in pretokenizers.KNOWN.values():
        cutter = Tokenizer.from_str(bpe(name)["tokenizer.json"].decode()).pre_tokenizer
        assert cutter is not None
        cuts.add(str([cutter.pre_tokenize_str(text) for text in (pretokenizers.CHECK_TEXT, *mixed_strings())]))
    assert len(cuts) == len(pretokenizers.KNOWN)


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def change(files: Files, name: str, **changed: Any) -> Files:
    return {**files, name: dumped({**json.loads(files[name]), **changed})}


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer"),
    [
        ({"type": "Whitespace"}, None),
        (None, None),
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, None),
        (
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            {"type": "Lowercase"},
        ),
    ],
)
def test_a_pre_tokenizer_without_a_name_is_refused(pre_tokenizer: Any, normalizer: Any) -> None:
    files = change(bpe("gpt-2"), "tokenizer.json", pre_tokenizer=pre_tokenizer, normalizer=normalizer)
    with pytest.raises(UsageError, match=r"model/tokenizer\.json: cuts texts in a way that llama\.cpp has no name for"):
        made(files, 902)


def test_line_ends_in_a_pattern_may_be_written_as_they_are() -> None:
    """As DeepSeek's are, and what does nothing to a text may be written as a list."""
    files = KINDS["DeepSeek V3"][0]()
    document = json.loads(files["tokenizer.json"])
    pattern = document["pre_tokenizer"]["pretokenizers"][2]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")
    document["normalizer"] = {"type": "Sequence", "normalizers": []}
    assert fields({**files, "tokenizer.json": dumped(document)}, 904)["tokenizer.ggml.pre"] == "deepseek-v3"


def test_other_models_of_tokenizers_are_refused() -> None:
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    with pytest.raises(UsageError, match="a tokenizer of the kind Unigram, expected BPE"):
        made(change(bpe("gpt-2"), "tokenizer.json", model=unigram), 902)
    with pytest.raises(UsageError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        made({}, 902)


@pytest.mark.parametrize(("kind", "rows"), [("sentencepiece alone", 1499), ("Qwen 2", 904), ("RoBERTa", 902)])
def test_more_tokens_than_rows_are_refused(kind: str, rows: int) -> None:
    with pytest.raises(UsageError, match=f"the tokenizer has {rows + 1} tokens, the embedding only {rows} rows"):
        made(KINDS[kind][0](), rows)


def test_what_has_no_place_is_named() -> None:
    files = {**spm_both(), "generation_config.json": dumped({"eos_token_id": [2, 7]})}
    files = change(files, "tokenizer_config.json", chat_template="another")
    found = made(files, 1502)
    assert found.metadata["tokenizer.chat_template"] == {"string": "another"}
    assert found.warnings == (
        "chat_template.jinja is left out: llama.cpp takes the chat template of tokenizer_config.json",
        "generation_config.json ends texts with <0x04> (7) too: left out, since GGUF has a place for one end",
    )
    files = {**spm(), "additional_chat_templates/rag.jinja": b"x", "added_tokens.json": dumped({"[PAD]": 1500})}
    assert made(change(files, "config.json", pad_token_id=1500), 1500).warnings == (
        "the token [PAD] (1500) is left out: the embedding has 1500 rows",
        "additional_chat_templates/rag.jinja: left out, as llama.cpp does without chat_template.jinja",
        "the pad token 1500 is left out: there are 1500 tokens",
    )
    assert made(qwen(), 905).warnings == ()


def bpe_json(vocabulary: dict[str, int], merges: list[str]) -> bytes:
    return dumped({"added_tokens": [], "model": {"type": "BPE", "vocab": vocabulary, "merges": merges}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "has no model"),
        ("tokenizer.json", b"[1]", "expected a JSON object"),
        ("tokenizer.json", bpe_json({"a": -1}, []), "no number"),
        ("tokenizer.json", bpe_json({"a": 0}, ["a b"]), "cannot be read"),
        ("tokenizer.json", bpe_json({"a" * 513: 0}, []), "a token of 513 characters, at most 512"),
        ("tokenizer.json", bpe_json({"a": 0}, ["a b c"]), "is no pair of tokens"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}', "x is no token"),
        ("added_tokens.json", b'{"<a>": "1"}', "the id of '<a>' is no number"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8"),
    ],
)
def test_damaged_files_are_refused_by_name(name: str, content: bytes, message: str) -> None:
    files = bpe("gpt-2") if name == "tokenizer.json" else spm()
    with pytest.raises(CorruptInput, match=f"^model/{name}.*{message}" if name[0] == "t" else message):
        made({**files, name: content}, 1500)


def test_nothing_but_errors_of_ours_comes_of_changed_files() -> None:
    chance = random.Random(5)
    for kind in ("sentencepiece with ChatML", "sentencepiece as tokenizer.json", "Tekken", "RoBERTa"):
        files, rows = KINDS[kind][0](), KINDS[kind][2]
        for _ in range(40):
            name = chance.choice([name for name in files if name != "tokenizer.model"])
            changed = bytearray(files[name])
            at = chance.randrange(len(changed))
            changed[at : at + chance.randrange(3)] = chance.choice([b"", b"null", b"[", b"0", b'"', b"-1", b"{}"])
            with contextlib.suppress(WeightopsError):
                made({**files, name: bytes(changed)}, rows)


def test_ends_that_llama_cpp_knows_by_name_are_not_mentioned() -> None:
    files = change(spm_converted(), "config.json", eos_token_id=[1501, 1500, 2])
    assert [STARTS in warning for warning in made(files, 1502).warnings] == [True]
    assert ENDS not in made(files, 1502).warnings[0]


def test_ids_below_zero_stand_for_none() -> None:
    """As in files of 2023; gguf's own code stops at them."""
    found = made(change(spm(), "config.json", pad_token_id=-1), 1500)
    assert "tokenizer.ggml.padding_token_id" not in found.metadata
