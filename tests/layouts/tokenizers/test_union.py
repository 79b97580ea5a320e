"""Tokenizers without tokens that have no rows, and with those of others added, always with the same ids."""

from __future__ import annotations

import json

import pytest
from merging_tokenizers import LETTERS, bpe, entry, files, unigram
from tokenizer_folders import spm, spm_chatml
from tokenizers import Tokenizer

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.layouts.tokenizers.union import (
    TokenizerDocument,
    missing,
    new_token,
    tokenizer_document,
    tokenizer_files,
    union,
)

ALL = 1 << 20


def backend(made: TokenizerDocument) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(made.document))


def read(folder: dict[str, bytes]) -> TokenizerDocument:
    found = tokenizer_document(TokenizerFiles(folder, "m"))
    assert found is not None
    return found


def named(*tokens: str, **changed: object) -> TokenizerDocument:
    return TokenizerDocument(bpe([("a", "b")], tokens), "m")


def test_tokens_have_the_ids_of_the_document() -> None:
    found = named("<x>")
    assert dict(found.ids) == {**{t: i for i, t in enumerate(LETTERS)}, "ab": 7, "<x>": 8}
    assert dict(found.ids) == backend(found).get_vocab()
    assert list(found.added) == ["<unk>", "<s>", "</s>", "<x>"]
    assert missing(["a", "q", "<x>"], found) == ["q"]


def test_tokens_beyond_the_rows_go_with_the_merges_that_make_or_use_them() -> None:
    whole = TokenizerDocument(bpe([("a", "b"), ("ab", "c"), ("c", "d"), ("abc", "d"), ("cd", "a")], ["<x>"]), "m")
    kept = whole.below(9)  # of the merges ab and abc
    assert kept.document["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert list(kept.ids) == [*LETTERS, "ab", "abc"]
    assert backend(kept).encode("abcdab").tokens == ["abc", "d", "ab"]
    assert whole.below(13) is whole
    without = TokenizerDocument(bpe([("a", "b"), ("ab", "c")], ["<x>"]), "m").below(8)
    assert without.document["model"]["merges"] == [["a", "b"]]
    assert "<x>" not in without.added


def test_merges_written_as_one_text_are_told_too() -> None:
    document = bpe([("a", "b"), ("ab", "c")])
    document["model"]["merges"] = ["a b", "ab c"]
    assert TokenizerDocument(document, "m").below(8).document["model"]["merges"] == ["a b"]


def test_tokens_of_other_kinds_are_not_taken_out() -> None:
    found = TokenizerDocument(unigram(["<unk>", "a", "b"], ["<x>"]), "m")
    assert dict(found.ids) == {"<unk>": 0, "a": 1, "b": 2, "<x>": 3}
    assert found.below(4) is found
    with pytest.raises(IncompatibleInputs, match="has 2 tokens that the model has no rows for, such as <x>") as caught:
        found.below(2)
    assert "tokenizer: {source: MODEL}" in str(caught.value.hint)


def test_new_tokens_come_by_model_and_id_ordinary_ones_first() -> None:
    base = named("<x>")
    one = TokenizerDocument(bpe([("c", "d"), ("b", "c")], ["<z>", "<y>"]), "one")
    two = TokenizerDocument(bpe([("d", "a"), ("c", "d")], ["<x>", "<w>"]), "two")
    made = union(base, [(one, ALL), (two, ALL)])
    assert list(dict(sorted(made.ids.items(), key=lambda item: item[1])))[9:] == ["cd", "bc", "da", "<z>", "<y>", "<w>"]
    assert {text: number for text, number in made.ids.items() if number < 9} == base.ids
    assert backend(made).get_vocab() == dict(made.ids)
    assert list(made.ids.values()) == sorted(set(made.ids.values()))
    again = union(base, [(one, ALL), (two, ALL)])
    assert again.document == made.document


def test_tokens_of_others_without_rows_do_not_count() -> None:
    one = TokenizerDocument(bpe([("c", "d"), ("b", "c")], ["<z>"]), "one")
    assert union(named(), [(one, 8)]).ids.keys() - named().ids.keys() == {"cd"}


def test_an_added_token_has_the_flags_of_the_first_that_has_it() -> None:
    first = TokenizerDocument(bpe([], [{"content": "<y>", "lstrip": True, "special": False}]), "one")
    second = TokenizerDocument(bpe([], [{"content": "<y>", "rstrip": True}, {"content": "<z>", "rstrip": True}]), "two")
    made = union(TokenizerDocument(bpe(), "m"), [(first, ALL), (second, ALL)])
    assert made.added["<y>"] == entry(7, "<y>", lstrip=True, special=False)
    assert made.added["<z>"] == entry(8, "<z>", rstrip=True)


def test_an_ordinary_token_of_one_that_is_added_in_another_is_an_added_one() -> None:
    ordinary = TokenizerDocument(bpe([("c", "d")]), "one")
    special = TokenizerDocument(bpe([], ["cd"]), "two")
    made = union(TokenizerDocument(bpe(), "m"), [(ordinary, ALL), (special, ALL)])
    assert made.added["cd"] == entry(7, "cd")


def test_ordinary_tokens_of_others_are_found_in_a_text_as_a_whole() -> None:
    made = union(named(), [(TokenizerDocument(bpe([("c", "d")]), "one"), ALL)])
    assert backend(made).encode("abcdc").tokens == ["ab", "cd", "c"]


def test_unigram_takes_tokens_too() -> None:
    made = union(
        TokenizerDocument(unigram(["<unk>", "a"]), "m"), [(TokenizerDocument(unigram(["<unk>", "b"]), "n"), ALL)]
    )
    assert dict(made.ids) == {"<unk>": 0, "a": 1, "b": 2}


def test_tokens_that_are_there_keep_their_ids() -> None:
    found = named("<x>")
    assert found.with_tokens([]) is found
    assert dict(found.with_tokens([new_token("ab"), new_token("<x>")]).ids) == dict(found.ids)


def test_a_sentencepiece_model_is_made_into_a_document() -> None:
    found = read(spm())
    assert (found.ids["<unk>"], found.ids["<s>"], found.ids["</s>"]) == (0, 1, 2)
    assert sorted(found.ids.values()) == list(range(1500))
    assert backend(found).decode(backend(found).encode("Hello  you").ids) == "Hello  you"
    assert found.below(1400).ids.keys() == {t for t, number in found.ids.items() if number < 1400}


def test_what_was_added_to_a_sentencepiece_model_is_in_it() -> None:
    found = read(spm_chatml())
    assert (found.ids["<|im_end|>"], found.ids["<|im_start|>"]) == (1500, 1501)
    assert {"<|im_end|>", "<|im_start|>"} <= found.added.keys()


def test_a_folder_without_a_tokenizer_has_none() -> None:
    assert tokenizer_document(TokenizerFiles({"config.json": b"{}"}, "m")) is None


VOCABULARIES = [None, {}, [], "x", {"vocab": 3}, {"vocab": [3]}, {"vocab": [[]]}, {"vocab": [[3, 0.0]]}]
VOCABULARIES += [{"vocab": {"a": number}} for number in ("0", -1, 1.5, True, None, 1 << 40)]


@pytest.mark.parametrize("model", VOCABULARIES)
def test_a_document_without_a_vocabulary_is_refused(model: object) -> None:
    with pytest.raises(CorruptInput, match=r"m/tokenizer\.json: (has no vocabulary|expected texts)"):
        _ = read({"tokenizer.json": json.dumps({"model": model}).encode()}).ids


@pytest.mark.parametrize(
    "tokens",
    [[{"content": "x"}], [{"id": 7}], [3], 3, [entry(-1, "x")], [entry(1 << 40, "x")], [{"id": 7, "content": 3}]],
)
def test_added_tokens_that_are_none_are_refused(tokens: object) -> None:
    with pytest.raises(CorruptInput, match="added_tokens: expected tokens with content and id"):
        _ = TokenizerDocument({**bpe(), "added_tokens": tokens}, "m").added


@pytest.mark.parametrize("merges", [None, 3, [3], "absent"])
def test_merges_that_are_none_are_refused_where_they_are_looked_at(merges: object) -> None:
    document = bpe([("a", "b")])
    document["model"]["merges"] = merges
    if merges == "absent":
        del document["model"]["merges"]
    with pytest.raises(CorruptInput, match="expected merges"):
        TokenizerDocument(document, "m").below(7)


def test_a_document_need_not_have_added_tokens() -> None:
    document = bpe([("a", "b")])
    del document["added_tokens"]
    assert list(TokenizerDocument(document, "m").below(7).ids) == list(LETTERS)


def test_what_no_tokenizer_can_be_made_of_is_refused() -> None:
    with pytest.raises(CorruptInput, match=r"m/tokenizer\.json"):
        TokenizerDocument({"model": {"type": "other", "vocab": {}}}, "m").with_tokens([new_token("x")])


def test_the_files_say_which_tokens_were_added_and_nothing_that_is_no_longer_so() -> None:
    old = TokenizerFiles(
        {**files(bpe(), vocab_file="x", pad_token="<s>"), "special_tokens_map.json": b"{}", "tokenizer.model": b"\n"},
        "m",
    )
    made = read(dict(old.files)).with_tokens([{"content": "<x>", "special": True}])
    found = tokenizer_files(made, old)
    assert set(found) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    config = json.loads(found["tokenizer_config.json"])
    assert {number: each["content"] for number, each in config["added_tokens_decoder"].items()} == {
        "0": "<unk>", "1": "<s>", "2": "</s>", "7": "<x>"
    }  # fmt: skip
    assert config["pad_token"] == "<s>"
    assert "vocab_file" not in config
    assert json.loads(found["tokenizer.json"]) == made.document
