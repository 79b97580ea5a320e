"""Sentencepiece models out of tokenizer.json, against the sentencepiece library and what they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece as reference
from small_tokenizers import mixed_strings, sentencepiece_model, training_text
from tokenizer_folders import dumped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from weightops.errors import CorruptInput, UsageError
from weightops.layouts.tokenizers import sentencepiece
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.layouts.tokenizers.hf import hf_files
from weightops.layouts.tokenizers.read import read_tokenizer
from weightops.layouts.tokenizers.tokens import Tokenizer as Read

SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}


def document() -> dict[str, Any]:
    files = hf_files(sentencepiece.parse(sentencepiece_model(), "tokenizer.model"), None)
    found: dict[str, Any] = json.loads(files["tokenizer.json"])
    return found


def read(document: object) -> Read:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    files = {"tokenizer.json": dumped(document), "tokenizer_config.json": dumped(config)}
    found = read_tokenizer(TokenizerFiles(files, "model"), generation="3", instruct=None)
    assert found is not None
    return found


def test_the_model_that_it_was_made_of_comes_back() -> None:
    found, original = read(document()), sentencepiece.parse(sentencepiece_model(), "tokenizer.model")
    assert found.tokens == original.tokens
    assert (found.bos_id, found.eos_ids, found.unk_id, found.add_dummy_prefix) == (1, (2,), 0, True)
    made, expected = (reference.SentencePieceProcessor(model_proto=t.data) for t in (found, original))
    assert made.encode(list(mixed_strings())) == expected.encode(list(mixed_strings()))


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "expected"),
    [
        ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, SPACES]}, None, True),
        ({"type": "Sequence", "normalizers": [SPACES]}, None, False),
        (SPACES, None, False),
        (None, {**METASPACE, "prepend_scheme": "first"}, True),
        (None, {**METASPACE, "prepend_scheme": "always"}, True),
        (None, {**METASPACE, "prepend_scheme": "never"}, False),
    ],
)
def test_whether_a_space_is_put_before_a_text(normalizer: Any, pre_tokenizer: Any, expected: bool) -> None:
    changed = {**document(), "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    found = read(changed)
    assert found.add_dummy_prefix == expected
    model, tokenizer = reference.SentencePieceProcessor(model_proto=found.data), Tokenizer.from_str(json.dumps(changed))
    for text in ("tensor", "the stream of tensors", "\u6d41\u5f0f 3"):
        assert model.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_tokens_out_of_the_order_of_merges_get_scores_by_it() -> None:
    changed = document()
    vocabulary = changed["model"]["vocab"]
    texts = list(vocabulary)
    texts[300:500] = reversed(texts[300:500])
    changed["model"]["vocab"] = {text: i for i, text in enumerate(texts)}
    model = reference.SentencePieceProcessor(model_proto=read(changed).data)
    expected = reference.SentencePieceProcessor(model_proto=sentencepiece_model())
    for text in mixed_strings():
        assert model.encode(text, out_type=str) == expected.encode(text, out_type=str)


def of_another_library() -> dict[str, Any]:
    """A BPE with byte fallback that the tokenizers library has trained: it has one merge for each token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(training_text()[:600], trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def _without(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda changed: changed["model"]["vocab"].pop(text)


def _late(merges: list[str]) -> None:
    """Put the second way of making a token behind all others."""
    made = ["".join(pair.split(" ")) for pair in merges]
    merges.append(merges.pop(next(i for i, text in enumerate(made) if text in made[:i])))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.update(normalizer={"type": "NFKC"}), UsageError, "prepares text in another way"),
        (lambda d: d.update(pre_tokenizer={**METASPACE, "split": True}), UsageError, "prepares text in another way"),
        (lambda d: _late(d["model"]["merges"]), UsageError, "not those of a sentencepiece model"),
        (lambda d: d["model"]["merges"].pop(), UsageError, "not those of a sentencepiece model"),
        (_without("<0x41>"), CorruptInput, "1499 tokens do not have the ids 0 to 1498"),
        (lambda d: d.update(of_another_library()), UsageError, "not those of a sentencepiece model"),
    ],
)
def test_what_tokenizer_model_cannot_hold_is_refused(
    change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    changed = document()
    change(changed)
    with pytest.raises(error, match=rf"model/tokenizer\.json: .*{message}"):
        read(changed)
