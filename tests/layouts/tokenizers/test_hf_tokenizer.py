"""Tokenizers in Hugging Face folders, loaded by transformers and held against sentencepiece and tiktoken."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from sentencepiece import SentencePieceProcessor
from small_tokenizers import (
    BOS,
    BYTES,
    EOS,
    NORMALIZER,
    TRAINER,
    UNKNOWN,
    message,
    mixed_strings,
    piece,
    rank_tokens,
    render_ranks,
    sentencepiece_model,
)
from tokenizers import Tokenizer as Loaded
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from weightops.layouts.tokenizers import ranks, sentencepiece
from weightops.layouts.tokenizers.hf import hf_files, inexact, special_ids
from weightops.layouts.tokenizers.ranks import PATTERN
from weightops.layouts.tokenizers.tokens import Tokenizer

Load = Callable[[Tokenizer], Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """What transformers makes of a tokenizer's folder."""

    def load(tokenizer: Tokenizer) -> Any:
        for name, data in hf_files(tokenizer, 4096).items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return AutoTokenizer.from_pretrained(tmp_path)

    return load


def read_pieces(data: bytes) -> Tokenizer:
    return sentencepiece.parse(data, "tokenizer.model")


def load_json(tokenizer: Tokenizer) -> Any:
    return Loaded.from_str(hf_files(tokenizer, None)["tokenizer.json"].decode())


def tiktoken_of(tokens: tuple[bytes, ...]) -> tiktoken.Encoding:
    vocabulary = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=vocabulary, special_tokens={})


def test_llama_2_is_cut_as_by_sentencepiece(load: Load) -> None:
    data = sentencepiece_model()
    library = SentencePieceProcessor(model_proto=data)
    loaded = load(read_pieces(data))
    wrong = [text for text in mixed_strings() if loaded.encode(text) != [library.bos_id(), *library.encode(text)]]
    assert wrong == []
    wrong = [text for text in mixed_strings() if loaded.decode(library.encode(text)) != text.replace("▁", " ")]
    assert wrong == []


def test_llama_3_is_cut_as_by_tiktoken(load: Load) -> None:
    tokenizer = ranks.parse(render_ranks(rank_tokens()), generation="3.1", instruct=True)
    library = tiktoken_of(rank_tokens())
    loaded = load(tokenizer)
    wrong = [t for t in mixed_strings() if loaded.encode(t) != [tokenizer.bos_id, *library.encode_ordinary(t)]]
    assert wrong == []
    assert [text for text in mixed_strings() if loaded.decode(library.encode_ordinary(text)) != text] == []


def test_transformers_learns_what_is_special(load: Load) -> None:
    pieces = load(read_pieces(sentencepiece_model(pad_id=3)))
    assert (pieces.bos_token_id, pieces.eos_token_id, pieces.unk_token_id, pieces.pad_token_id) == (1, 2, 0, 3)
    assert pieces.tokenize("a</s>b") == ["▁a", "</s>", "▁b"]
    assert pieces.decode([1, *pieces.encode("a", add_special_tokens=False), 2], skip_special_tokens=True) == "a"

    loaded = load(ranks.parse(render_ranks(rank_tokens()), generation="3.1", instruct=True))
    count = len(rank_tokens())
    assert (loaded.bos_token_id, loaded.eos_token, len(loaded)) == (count, "<|eot_id|>", count + 256)
    assert loaded.encode("<|start_header_id|><|python_tag|>") == [count, count + 6, count + 10]
    assert loaded.model_input_names == ["input_ids", "attention_mask"]
    assert loaded.model_max_length == 4096
    assert loaded.clean_up_tokenization_spaces is False


@pytest.mark.parametrize(
    "changed",
    [
        {"user_defined_symbols": "<mask>,[[x]],.*"},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
    ],
)
def test_settings_that_llama_does_not_use_are_kept(changed: dict[str, Any]) -> None:
    data = sentencepiece_model(**changed)
    library = SentencePieceProcessor(model_proto=data)
    loaded = load_json(read_pieces(data))
    chance = random.Random(5)
    symbols = ["<mask>", "[[x]]", ".*", "<mask> ", " [[x]]"]
    texts = [
        chance.choice(symbols) + chance.choice(symbols) + text + chance.choice(symbols) for text in mixed_strings()
    ]
    texts += mixed_strings()
    ids = {text: library.encode(text) for text in texts}
    assert [text for text in texts if loaded.encode(text).ids != [library.bos_id(), *ids[text]]] == []
    known = [text for text in texts if library.unk_id() not in ids[text]]
    assert [text for text in known if loaded.decode(ids[text]) != library.decode(ids[text])] == []


def _clashing(chance: random.Random, alphabet: str) -> list[str]:
    """Strings that are made of one another in many ways."""
    made: list[str] = []
    for _ in range(chance.randint(3, 60)):
        new = chance.choice([*alphabet, *made]) + chance.choice([*alphabet, *made])
        made += [new] if len(new) <= 10 and new not in made else []
    return chance.sample(made, len(made))


def test_merges_that_clash_happen_in_the_order_of_the_libraries() -> None:
    chance = random.Random(6)
    for alphabet in ["a", "ab", "ab", "ab▁", "abc"] * 4:
        made = _clashing(chance, alphabet)
        scored = [piece(text, score=-float(i)) for i, text in enumerate(made + sorted(set(alphabet)))]
        model = message(UNKNOWN, BOS, EOS, *BYTES, *scored, TRAINER, NORMALIZER)
        pieces, library = load_json(read_pieces(model)), SentencePieceProcessor(model_proto=model)
        tokens = (*(bytes([byte]) for byte in range(256)), *(text.replace("▁", " ").encode() for text in made))
        tokenizer = ranks.parse(render_ranks(tokens), generation="3", instruct=False)
        loaded, other = load_json(tokenizer), tiktoken_of(tokens)
        for _ in range(100):
            text = "".join(chance.choices(alphabet.replace("▁", " "), k=chance.randint(1, 40)))
            assert pieces.encode(text).ids == [1, *library.encode(text)]
            assert loaded.encode(text).ids == [tokenizer.bos_id, *other.encode_ordinary(text)]


def test_merges_are_those_of_transformers() -> None:
    chinese = [piece(text) for text in ("中", "文", "中文", "文中", "中文中")]
    tokenizer = read_pieces(sentencepiece_model() + message(*chinese))
    vocabulary = {token.data.decode(): i for i, token in enumerate(tokenizer.tokens)}
    scores = [(token.data.decode(), token.score) for token in tokenizer.tokens]
    merges = json.loads(hf_files(tokenizer, None)["tokenizer.json"])["model"]["merges"]
    assert [tuple(merge.split(" ")) for merge in merges] == generate_merges(vocabulary, scores)


def test_text_is_never_merged_into_a_token_for_a_byte_or_of_control() -> None:
    texts = ["<0x4", "1>", "<0x", "<0", "</", "s>", "x4", "4", "1", "<", "0", "x", ">", "/", "s"]
    pieces = [piece(text, score=-float(i)) for i, text in enumerate(texts)]
    model = message(UNKNOWN, BOS, EOS, *BYTES, *pieces, TRAINER, NORMALIZER)
    tokenizer = read_pieces(model)
    merges = json.loads(hf_files(tokenizer, None)["tokenizer.json"])["model"]["merges"]
    assert "</ s>" not in merges
    assert load_json(tokenizer).encode("<0x41>").ids[1:] == SentencePieceProcessor(model_proto=model).encode("<0x41>")


def test_merges_that_older_readers_would_skip_are_written_so_that_none_does() -> None:
    tokens = (*(bytes([byte]) for byte in range(256)), *(b"#version"[:end] for end in range(2, 9)), b"#versions")
    loaded = load_json(ranks.parse(render_ranks(tokens), generation="3", instruct=False))
    assert loaded.encode("#versionss").ids[1:] == tiktoken_of(tokens).encode_ordinary("#versionss")


def test_what_tokenizer_json_cannot_say_is_told() -> None:
    assert inexact(read_pieces(sentencepiece_model())) == ()
    assert inexact(ranks.parse(render_ranks(rank_tokens()), generation="3", instruct=True)) == ()
    odd = [piece("a"), piece("aa"), piece("aaa"), piece("中文", score=-1.0), piece("aaaa", 5, -2.0), piece("[x]", 4)]
    reasons = inexact(read_pieces(message(UNKNOWN, BOS, EOS, *BYTES, *odd, TRAINER, NORMALIZER)))
    assert [reason.partition(": ")[2].split(",")[0] for reason in reasons] == [
        "2 pieces have the score of another",
        "1 pieces are marked as unused",
        "1 pieces hold characters that are no pieces themselves",
        "1 pieces are defined by users",
    ]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (lambda: read_pieces(sentencepiece_model(pad_id=3)), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}),
        (
            lambda: ranks.parse(render_ranks(rank_tokens()), generation="3.1", instruct=True),
            {"bos_token_id": 0, "eos_token_id": [1, 8, 9]},
        ),
    ],
)
def test_ids_for_configurations(tokenizer: Callable[[], Tokenizer], expected: dict[str, Any]) -> None:
    found = tokenizer()
    first = len(rank_tokens()) if found.kind == "ranks" else 0
    moved = {k: [i + first for i in v] if isinstance(v, list) else v + first for k, v in expected.items()}
    assert special_ids(found) == moved
