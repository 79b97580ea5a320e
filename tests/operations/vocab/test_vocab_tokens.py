"""Added tokens, and what ends a turn: the same in every file, for tokenizers of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig
from vocabularies import KINDS, count, document, matrices, write_model

import weightops
from weightops.errors import UsageError

TOKENS = ("<|im_start|>", "<|im_stop|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_stop|>\n{% endfor %}"


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("added")
    (folder / "chat.jinja").write_text(TEMPLATE)
    source = write_model(folder / "model", KINDS[request.param](), padding=1)
    options = {"add_token": TOKENS, "ends_turn": True, "chat_template": folder / "chat.jinja"}
    weightops.vocab(source, folder / "out", **options)
    return source, folder / "out"


def test_the_end_of_a_turn_is_the_same_in_all_four_places(pair: tuple[Path, Path]) -> None:
    source, out = pair
    tokenizer = AutoTokenizer.from_pretrained(out)
    end = tokenizer.convert_tokens_to_ids(TOKENS[1])
    assert tokenizer.eos_token_id == end
    assert tokenizer.decode([end]) == TOKENS[1]
    stated = document(out, "config.json")["eos_token_id"]
    assert stated == end or stated[0] == end
    before = document(source, "config.json")["eos_token_id"]
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert ends[0] == end
    assert {*ends} == {end, *(before if isinstance(before, list) else [before])}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert tokenizer(chat, add_special_tokens=False)["input_ids"].count(end) == 1


def test_tokens_come_behind_the_others_and_each_has_a_row(pair: tuple[Path, Path]) -> None:
    _, out = pair
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in pair)
    ids = after.convert_tokens_to_ids(list(TOKENS))
    first = len(before)
    known = [text for text in TOKENS if text in before.get_vocab()]
    assert ids[1] == first + 1 - len(known)
    rows = len(matrices(out)["model.embed_tokens.weight"])
    assert rows == document(out, "config.json")["vocab_size"] == max(first + 2 - len(known), rows)
    assert before.get_vocab().items() <= after.get_vocab().items()


def test_without_a_template_or_new_tokens_the_ids_alone_change(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["byte BPE"]())
    weightops.vocab(source, tmp_path / "out", add_token="<|endoftext|>", ends_turn=True)
    assert matrices(tmp_path / "out").keys() == matrices(source).keys()
    for name, tensor in matrices(source).items():
        assert torch.equal(tensor, matrices(tmp_path / "out")[name])
    assert document(tmp_path / "out", "generation_config.json")["eos_token_id"] == [900, 901]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|endoftext|>"


def test_files_that_say_nothing_else_are_carried_to_the_byte(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["byte BPE"]())
    (tmp_path / "new.jinja").write_text("<|im_end|>new")
    weightops.vocab(source, tmp_path / "out", chat_template=tmp_path / "new.jinja")
    for name in ("config.json", "tokenizer.json"):
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_new_token_takes_a_row_that_none_used_and_that_is_made_anew(tmp_path: Path) -> None:
    files = KINDS["WordPiece"]()
    source = write_model(tmp_path / "model", files, padding=10)
    weightops.vocab(source, tmp_path / "out", add_token=["<a>", "<b>"], init="zero")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = matrices(source)[name].clone(), matrices(tmp_path / "out")[name]
        before[count(files) : count(files) + 2] = 0
        assert torch.equal(before, after)


def test_ordinary_tokens_are_no_special_ones(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["byte BPE"]())
    weightops.vocab(source, tmp_path / "out", add_token="weightwise", special=False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("a weightwise b").ids, skip_special_tokens=True) == "a weightwise b"
    assert "weightwise" in tokenizer.encode("a weightwise b").tokens


def test_a_template_that_never_ends_a_turn_is_refused_if_given_and_named_if_not(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["byte BPE"]())
    (tmp_path / "bad.jinja").write_text("{{ messages[0]['content'] }}<|other|>")
    options = {"add_token": "<|im_stop|>", "ends_turn": True}
    with pytest.raises(UsageError, match=r"never writes <\|im_stop\|>"):
        weightops.vocab(source, tmp_path / "out", **options, chat_template=tmp_path / "bad.jinja")
    assert not (tmp_path / "out").exists()
    said = weightops.vocab(source, tmp_path / "out", **options).warnings
    assert any("never writes <|im_stop|>" in text and "may not stop" in text for text in said)


def test_a_template_that_names_the_end_by_its_variable_is_right(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["WordPiece"]())
    (tmp_path / "good.jinja").write_text("{{ messages[0]['content'] }}{{ eos_token }}")
    options = {"add_token": "<|stop|>", "ends_turn": True, "chat_template": tmp_path / "good.jinja"}
    said = weightops.vocab(source, tmp_path / "out", **options).warnings
    assert not any("never writes" in text for text in said)
    chat = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template([{"content": "x"}], tokenize=False)
    assert chat == "x<|stop|>"


def test_templates_in_other_files_give_way_to_the_new_one(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["byte BPE"]())
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    (tmp_path / "new.jinja").write_text("<|im_end|>new")
    weightops.vocab(source, tmp_path / "out", chat_template=tmp_path / "new.jinja")
    assert not (tmp_path / "out/chat_template.json").exists()
    assert "chat_template" not in document(tmp_path / "out", "tokenizer_config.json")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "<|im_end|>new"


def test_text_config_and_lists_get_the_end_too(tmp_path: Path) -> None:
    config = {"text_config": {"eos_token_id": [901], "vocab_size": 911}, "eos_token_id": 901}
    source = write_model(tmp_path / "model", KINDS["byte BPE"](), **config)
    weightops.vocab(source, tmp_path / "out", add_token="<|stop|>", ends_turn=True, rows=920)
    made = document(tmp_path / "out", "config.json")
    assert (made["eos_token_id"], made["text_config"]["eos_token_id"]) == (905, [905, 901])
    assert made["vocab_size"] == made["text_config"]["vocab_size"] == 920
