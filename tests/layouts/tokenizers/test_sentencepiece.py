"""The reader of sentencepiece models, against the library itself."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from small_tokenizers import BOS, BYTES, EOS, NORMALIZER, TRAINER, UNKNOWN, message, piece, sentencepiece_model

from weightops.errors import CorruptInput, UsageError, WeightopsError
from weightops.layouts.tokenizers.hf import hf_files
from weightops.layouts.tokenizers.sentencepiece import parse
from weightops.layouts.tokenizers.tokens import Kind


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"pad_id": 3, "user_defined_symbols": "<mask>,[[x]]", "control_symbols": "[INST]"},
        {"bos_piece": "[BOS]", "eos_id": -1, "byte_fallback": False, "add_dummy_prefix": False},
    ],
    ids=["llama", "more-tokens", "fewer-tokens"],
)
def test_tokens_are_those_of_the_library(changed: dict[str, Any]) -> None:
    data = sentencepiece_model(**changed)
    library = SentencePieceProcessor(model_proto=data)
    tokenizer = parse(data, "tokenizer.model")

    ids = range(library.vocab_size())
    assert [t.data.decode() for t in tokenizer.tokens] == [library.id_to_piece(i) for i in ids]
    assert [t.score for t in tokenizer.tokens] == [library.get_score(i) for i in ids]
    for kind, question in (
        (Kind.CONTROL, library.is_control),
        (Kind.UNKNOWN, library.is_unknown),
        (Kind.BYTE, library.is_byte),
        (Kind.UNUSED, library.is_unused),
    ):
        assert [t.kind is kind for t in tokenizer.tokens] == [question(i) for i in ids]
    ends = tokenizer.eos_ids[0] if tokenizer.eos_ids else -1
    found = [-1 if i is None else i for i in (tokenizer.bos_id, ends, tokenizer.unk_id, tokenizer.pad_id)]
    assert found == [library.bos_id(), library.eos_id(), library.unk_id(), library.pad_id()]
    assert tokenizer.add_dummy_prefix == (changed.get("add_dummy_prefix") is not False)
    assert tokenizer.data == data


def test_symbols_that_users_defined_are_told_from_others() -> None:
    tokenizer = parse(sentencepiece_model(user_defined_symbols="<mask>,[[x]]"), "tokenizer.model")
    assert [t.data for t in tokenizer.tokens if t.kind is Kind.USER_DEFINED] == [b"<mask>", b"[[x]]"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model_type": "unigram", "vocab_size": 600}, "a unigram model of sentencepiece, expected a BPE one"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites characters"),
        ({"remove_extra_whitespaces": True}, "removes repeated spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces after words"),
    ],
)
def test_models_that_no_llama_has_are_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        parse(sentencepiece_model(**changed), "tokenizer.model")


GOOD = (UNKNOWN, BOS, EOS, *BYTES, piece("a"), TRAINER, NORMALIZER)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "0 pieces and 0 of 2 parts"),
        (message(TRAINER, NORMALIZER), "0 pieces and 2 of 2 parts on training and normalisation: cut short, or no"),
        (message(*GOOD[:-1]), "260 pieces and 1 of 2 parts"),
        (message(*GOOD[1:]), "0 pieces for what is unknown, expected one"),
        (message(*GOOD, piece("<u>", 2)), "2 pieces for what is unknown"),
        (message(*GOOD, piece("a")), "the piece 'a' occurs twice"),
        (message(*GOOD, piece("\x1b[2J"), piece("\x1b[2J")), r"the piece '\\\\x1b\[2J' occurs twice"),
        (message(*GOOD, piece("")), "piece 260: 0 bytes long, expected 1 to 512"),
        (message(*GOOD, piece("a" * 513)), "piece 260: 513 bytes long"),
        (message(*GOOD, piece(b"\xff")), "piece 260: not UTF-8"),
        (message(*GOOD, piece("b", score=float("nan"))), "its score is nan"),
        (message(*GOOD, piece("b", 9)), "of type 9, expected 1 to 6"),
        (message(*GOOD[:9], *GOOD[10:]), r"255 pieces for bytes, expected 256"),
        (message(*GOOD, piece("<0x0a>", 6)), r"257 pieces for bytes, expected 256"),
        (message(*GOOD, TRAINER), "field 2 occurs twice"),
        (message(*GOOD[:-2], (2, message((3, 2), (3, 2))), NORMALIZER), "trainer: field 3 occurs twice"),
        (message(*GOOD[:-2], (2, message((3, 7))), NORMALIZER), "model of type 7"),
        (message(*GOOD) + b"\x08\x01", "field 1 has wire type 0, expected 2"),
        (message(*GOOD, (1, message((1, b"b"), (2, 7)))), "piece 260: field 2 has wire type 0, expected 5"),
        (message(*GOOD) + b"\x7b", "field 15 has wire type 3, which is not read"),
        (message(*GOOD) + b"\x02\x00", "there is no protobuf field 0"),
        (message(*GOOD) + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "cut short, field 1 wants 9223372036854775807"),
        (message(*GOOD) + b"\x78" + b"\xff" * 10 + b"\x01", "number of over 64 bits"),
        (message(*GOOD) + b"\x78" + b"\xff" * 9 + b"\x02", "number of over 64 bits"),
        (message(*GOOD) + b"\x78\xff", "cut short within a number"),
    ],
)
def test_hostile_models_are_refused(data: bytes, expected: str) -> None:
    with pytest.raises(WeightopsError, match=expected):
        parse(data, "tokenizer.model")


def test_nothing_but_errors_of_ours_comes_of_cut_and_changed_models() -> None:
    chance = random.Random(3)
    merged = [piece(text, score=-float(i)) for i, text in enumerate(["ab", "abc", "▁a", "bc", "▁abc", "b", "c", "▁"])]
    whole = message(UNKNOWN, BOS, EOS, *BYTES, piece("a"), *merged, TRAINER, NORMALIZER)
    ends = [whole[:length] for length in range(len(whole) - 200, len(whole))]
    changed = []
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.choice([chance.randrange(len(data)), len(data) - 1 - chance.randrange(200)])] = (
                chance.randrange(256)
            )
        changed.append(bytes(data))
    read = 0
    for data in ends + changed:
        with contextlib.suppress(WeightopsError):
            hf_files(parse(data, "tokenizer.model"), None)
            read += 1
    assert 0 < read < len(ends + changed)


def test_a_model_with_absurdly_many_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.layouts.tokenizers.sentencepiece.MAX_TOKENS", 259)
    with pytest.raises(CorruptInput, match="over 259 pieces"):
        parse(message(*GOOD), "tokenizer.model")
