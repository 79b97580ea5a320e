"""Llama 3's rank files, against tiktoken's and transformers' ways with them."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import rank_tokens, render_ranks, sentencepiece_model, trained_ranks
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from weightops.errors import CorruptInput, UsageError, WeightopsError
from weightops.layouts.tokenizers import ranks, sentencepiece
from weightops.layouts.tokenizers.hf import hf_files
from weightops.layouts.tokenizers.ranks import (
    SPECIAL_TOKENS,
    Generation,
    from_tokenizer_json,
    from_unicode,
    to_unicode,
)
from weightops.layouts.tokenizers.tokenizer_json import read_tokenizer_json
from weightops.layouts.tokenizers.tokens import Kind
from weightops.layouts.tokenizers.tokens import Tokenizer as Read

SMALL = (*(bytes([byte]) for byte in range(256)), b"ab", b" a", b"abc", b"bc")


def test_tokens_are_ranks_and_then_special_ones() -> None:
    data = render_ranks(rank_tokens())
    tokenizer = ranks.parse(data, generation="3", instruct=False)
    count = len(rank_tokens())
    assert tuple(t.data for t in tokenizer.tokens[:count]) == rank_tokens()
    assert tuple(t.data.decode() for t in tokenizer.tokens[count:]) == SPECIAL_TOKENS["3"]
    assert {t.kind for t in tokenizer.tokens[count:]} == {Kind.CONTROL}
    assert (tokenizer.bos_id, tokenizer.data, ranks.rank_file(tokenizer)) == (count, data, data)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ("3", {3: "reserved_special_token_1", 4: "reserved_special_token_2", 8: "reserved_special_token_4"}),
        ("3.1", {4: "finetune_right_pad_id", 5: "reserved_special_token_2", 8: "eom_id", 10: "python_tag"}),
    ],
)
def test_special_tokens_are_where_metas_are(generation: Generation, expected: dict[int, str]) -> None:
    last = {"3": "reserved_special_token_250", "3.1": "reserved_special_token_247"}[generation]
    common = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id", 255: last}
    names = SPECIAL_TOKENS[generation]
    assert len(set(names)) == 256
    assert {i: names[i] for i in common | expected} == {i: f"<|{name}|>" for i, name in (common | expected).items()}


@pytest.mark.parametrize(
    ("generation", "instruct", "expected"),
    [("3", False, [1]), ("3.1", False, [1]), ("3", True, [1, 9]), ("3.1", True, [1, 8, 9])],
)
def test_instruct_models_end_with_their_turns(generation: Generation, instruct: bool, expected: list[int]) -> None:
    tokenizer = ranks.parse(render_ranks(SMALL), generation=generation, instruct=instruct)
    assert [i - len(SMALL) for i in tokenizer.eos_ids] == expected


def test_merges_are_those_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(render_ranks(rank_tokens()))
    vocabulary, merges = TikTokenConverter(str(path)).extract_vocab_merges_from_model(str(path))
    assert vocabulary == {to_unicode(token): rank for rank, token in enumerate(rank_tokens())}
    assert [(to_unicode(a), to_unicode(b)) for a, b in ranks.merges(rank_tokens())] == merges


def test_bytes_are_written_as_visible_characters_and_back() -> None:
    every = bytes(range(256))
    assert sorted(to_unicode(every)) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert from_unicode(to_unicode(every)) == every
    assert to_unicode(" é\n".encode()) == "ĠÃ©Ċ"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: lines[:5] + lines[6:], "no line has the rank 5"),
        (lambda lines: [*lines[:-1], b"YmM= 3"], "line 260: the rank 3 has been given before"),
        (lambda lines: [*lines, b"YWI= 260"], "1 tokens occur twice"),
        (lambda lines: [*lines, b"YWI 260"], "line 261: expected a token in base64, found 'YWI'"),
        (lambda lines: [*lines, b"YWJ= 260"], "line 261: expected a token in base64"),
        (lambda lines: [*lines, b"Y*J= 260"], "line 261: expected a token in base64"),
        (lambda lines: [*lines, b" 260"], "line 261: expected a token in base64, found ''"),
        (lambda lines: [*lines, b"eHl6"], "line 261: expected a token in base64, a space and its rank"),
        (lambda lines: [*lines, b"eHl6 260 261"], "line 261: expected a token in base64, a space and its rank"),
        (lambda lines: [*lines, b"eHl6 -1"], "line 261: expected a rank, found '-1'"),
        (lambda lines: [*lines, b"eHl6 0260"], "line 261: expected a rank, found '0260'"),
        (lambda lines: [*lines, b"eHl6 " + b"9" * 5000], "line 261: expected a rank"),
        (lambda lines: [*lines, b"eHl6" * 200 + b" 260"], "a token of 600 bytes, at most 512"),
        (lambda lines: [b"YWJj 0", *lines[1:258]], "no token for the byte 0x00"),
        (lambda lines: [], "no token for the byte 0x00"),
    ],
)
def test_damaged_rank_files_are_refused(change: Callable[[list[bytes]], list[bytes]], expected: str) -> None:
    data = b"\n".join(change(render_ranks(SMALL).splitlines()))
    with pytest.raises(CorruptInput, match=expected):
        ranks.parse(data, generation="3.1", instruct=False)


def test_lines_in_any_order_and_of_windows_are_read() -> None:
    lines = render_ranks(SMALL).splitlines()
    random.Random(1).shuffle(lines)
    tokenizer = ranks.parse(b"\r\n".join(lines), generation="3", instruct=False)
    assert ranks.rank_file(tokenizer) == render_ranks(SMALL)


def test_tokens_that_were_added_have_no_place_in_a_rank_file() -> None:
    document = _document()
    document["added_tokens"].append({**document["added_tokens"][-1], "id": 516, "content": "[PAD]"})
    tokenizer = _read(json.dumps(document).encode())
    with pytest.raises(UsageError, match="257 special tokens, expected 256"):
        ranks.rank_file(tokenizer)


def test_the_rank_file_comes_back_from_our_tokenizer_json() -> None:
    data = render_ranks(rank_tokens())
    tokenizer = ranks.parse(data, generation="3.1", instruct=False)
    assert _read(hf_files(tokenizer, None)["tokenizer.json"]) == tokenizer


def test_the_rank_file_comes_back_from_a_tokenizer_json_with_one_merge_for_each_token() -> None:
    tokenizer = Tokenizer.from_str(trained_ranks().to_str())
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL_TOKENS["3.1"]])
    read = _read(tokenizer.to_str().encode())
    assert read == ranks.parse(render_ranks(rank_tokens()), generation="3.1", instruct=False)


def _read(data: bytes) -> Read:
    return from_tokenizer_json(read_tokenizer_json(data, "tokenizer.json"))


def _document() -> dict[str, Any]:
    """tokenizer.json for SMALL."""
    tokenizer = ranks.parse(render_ranks(SMALL), generation="3.1", instruct=False)
    document = json.loads(hf_files(tokenizer, None)["tokenizer.json"])
    assert isinstance(document, dict)
    return document


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for name in parents:
            document = document[int(name) if isinstance(document, list) else name]
        document[int(last) if isinstance(document, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        (_set("pre_tokenizer/pretokenizers/0/pattern/Regex", r"\s+"), UsageError, "not a tokenizer of Llama 3"),
        (_set("normalizer", {"type": "NFC"}), UsageError, "not a tokenizer of Llama 3"),
        (_set("model", []), CorruptInput, "has no model"),
        (_set("model/vocab", []), CorruptInput, "expected an object of at most"),
        (_set("model/vocab/ab", True), CorruptInput, "the id of 'ab' is no number"),
        (_set("model/vocab/ab", 300), CorruptInput, "the id 300 is given to two tokens"),
        (_set("model/vocab/ab", 600), CorruptInput, "no token has the id 256"),
        (_set("model/vocab/ab", 257), CorruptInput, "an id is given to two tokens"),
        (_set("model/vocab/\u4e00", 260), CorruptInput, "the id 260 is given to two tokens"),
        (_set("model/merges/0", "a"), CorruptInput, "merges: 'a' is no pair of tokens"),
        (_set("model/merges/0", ["a", 1]), CorruptInput, "is no pair of tokens"),
        (_set("model/merges/0", "x y"), CorruptInput, "merges: 'x y' does not make up a token of two"),
        (_set("model/merges/0", "a bc"), UsageError, "merges are not in the order of ids"),
        (_set("model/merges", None), CorruptInput, "merges: expected a list of at most"),
        (_set("model/merges", ["a b"]), CorruptInput, "none makes up 3 tokens"),
        (_set("added_tokens/0/content", "<s>"), CorruptInput, r"no token <\|begin_of_text\|>"),
        (_set("added_tokens/0/id", 261), CorruptInput, "added_tokens: the id 261 is given to two tokens"),
        (_set("added_tokens/0/id", 900), CorruptInput, "no token has the id 260"),
        (_set("added_tokens/0/content", "<|eot_id|>"), CorruptInput, "a token occurs twice"),
        (_set("added_tokens", {}), CorruptInput, "expected a list of objects with id, content and special"),
    ],
)
def test_other_tokenizer_json_is_refused(
    change: Callable[[dict[str, Any]], None], error: type[WeightopsError], expected: str
) -> None:
    document = _document()
    change(document)
    with pytest.raises(error, match=expected):
        _read(json.dumps(document).encode())


def test_tokenizer_json_of_another_kind_is_refused_with_a_hint() -> None:
    files = hf_files(sentencepiece.parse(sentencepiece_model(), "tokenizer.model"), None)
    with pytest.raises(UsageError, match="not a tokenizer of Llama 3") as caught:
        _read(files["tokenizer.json"])
    assert caught.value.hint == "--to gguf takes it; --no-tokenizer converts the weights alone"


def test_nothing_but_errors_of_ours_comes_of_changed_files() -> None:
    chance = random.Random(4)
    lines, document = render_ranks(SMALL), json.dumps(_document()).encode()
    for _ in range(300):
        for data, read in (
            (lines, lambda changed: ranks.parse(changed, generation="3.1", instruct=True)),
            (document, _read),
        ):
            changed = bytearray(data)
            changed[chance.randrange(len(data))] = chance.randrange(256)
            with contextlib.suppress(WeightopsError):
                hf_files(read(bytes(changed)), None)
