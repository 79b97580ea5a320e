"""Trimmed tokenizers of every kind: the corpus as before, any text back, ids without gaps, rows that go with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from small_tokenizers import mixed_strings
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from vocabularies import CORPUS, KINDS, document, matrices, write_model

import weightops

Cut = Callable[[str], tuple[list[str], list[int], str]]


def cutter(folder: Path) -> tuple[Cut, dict[str, int]]:
    """Tokens, ids and the text given back, by whatever reads the folder's tokenizer; and its ids."""
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

        def cut(text: str) -> tuple[list[str], list[int], str]:
            found = tokenizer.encode(text, add_special_tokens=False)
            return found.tokens, found.ids, tokenizer.decode(found.ids, skip_special_tokens=False)

        return cut, tokenizer.get_vocab()
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    added = document(folder, "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))} | added

    def cut_pieces(text: str) -> tuple[list[str], list[int], str]:
        found = pieces.encode(text)
        return [pieces.id_to_piece(i) for i in found], found, pieces.decode(found)

    return cut_pieces, ids


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("trim")
    (folder / "corpus.txt").write_text(CORPUS)
    source = write_model(folder / "model", KINDS[request.param]())
    weightops.vocab(source, folder / "out", trim=folder / "corpus.txt")
    return source, folder / "out"


def test_the_corpus_is_split_as_before(pair: tuple[Path, Path]) -> None:
    (before, old), (after, new) = map(cutter, pair)
    assert len(new) < 0.9 * len(old)
    for line in CORPUS.splitlines():
        assert before(line)[0] == after(line)[0], line
        assert [new[text] for text in after(line)[0]] == after(line)[1]


def test_a_thousand_strings_come_back_as_before(pair: tuple[Path, Path]) -> None:
    (before, _), (after, _) = map(cutter, pair)
    lost = [text for text in mixed_strings(1000) if before(text)[2] != after(text)[2]]
    assert lost == []


def test_ids_have_no_gaps_and_rows_go_with_them(pair: tuple[Path, Path]) -> None:
    source, out = pair
    (_, old), (_, new) = map(cutter, pair)
    assert sorted(new.values()) == list(range(len(new)))
    assert sorted(new, key=new.__getitem__) == [text for text in sorted(old, key=old.__getitem__) if text in new]
    tensors, originals = matrices(out), matrices(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(tensors[name]) == len(new) == document(out, "config.json")["vocab_size"]
        assert torch.equal(tensors[name][list(new.values())], originals[name][[old[text] for text in new]])
    assert torch.equal(tensors["model.norm.weight"], originals["model.norm.weight"])


def test_every_id_in_every_file_is_that_of_the_token_it_was(pair: tuple[Path, Path]) -> None:
    source, out = pair
    (_, old), (_, new) = map(cutter, pair)
    texts, moved = ({i: text for text, i in ids.items()} for ids in (old, new))
    for name in ("config.json", "generation_config.json"):
        if not (source / name).exists():
            continue
        for key, value in document(source, name).items():
            if key.endswith("_token_id"):
                was, now = (v if isinstance(v, list) else [v] for v in (value, document(out, name)[key]))
                assert [texts[i] for i in was] == [moved[i] for i in now], (name, key)
    decoder = document(out, "tokenizer_config.json").get("added_tokens_decoder", {})
    assert {int(i): token["content"] for i, token in decoder.items()}.items() <= moved.items()
    if (out / "tokenizer.json").exists():
        around = [Tokenizer.from_file(str(folder / "tokenizer.json")).encode("") for folder in pair]
        assert around[0].tokens == around[1].tokens
        assert [moved[i] for i in around[1].ids] == around[1].tokens
        added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
        assert all(moved[entry["id"]] == entry["content"] for entry in added)


def test_transformers_reads_it(pair: tuple[Path, Path]) -> None:
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in pair)
    assert len(after) == len(cutter(pair[1])[1])
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(before, role) == getattr(after, role)
    for line in CORPUS.splitlines()[:20]:
        assert before.tokenize(line) == after.tokenize(line), line
