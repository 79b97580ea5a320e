"""Another's tokenizer: which tokens are the same, what the others are made of, and where mergekit's rules are wrong.

Compared with mergekit-tokensurgeon 0.1.5, whose rules are written down here once more as its code has them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import training_text
from support import write_checkpoint
from tokenizer_folders import Files, bpe, dumped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import KINDS, WIDTH, document, matrices, write_model

import weightops
from weightops.errors import IncompatibleInputs, UsageError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Wanted = Callable[[str], torch.Tensor]


@functools.cache
def other() -> str:
    """A byte-level BPE of other words than `bpe` has, with its own special tokens at both ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(training_text()[600:1500], trainer)
    tokenizer.add_special_tokens(["<|end|>", "<|user|>"])
    return str(tokenizer.to_str())


def donor_files(**config: Any) -> Files:
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "pad_token": "<pad>",
    }
    ids = {"bos_token_id": 1, "eos_token_id": 500, "pad_token_id": 0, "suppress_tokens": None}
    return {
        "tokenizer.json": other().encode(),
        "tokenizer_config.json": dumped({**said, **config}),
        "config.json": dumped(ids),
        "chat_template.jinja": b"<|user|>{{ messages }}<|end|>",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose eos is <|im_end|>, and a donor that is wider and has more rows than tokens."""
    here = tmp_path_factory.mktemp("transplant")
    files = bpe("qwen2", bos_token="<|endoftext|>", eos_token="<|im_end|>")
    files["config.json"] = dumped({"bos_token_id": 900, "eos_token_id": 901, "pad_token_id": None})
    files["generation_config.json"] = dumped({"temperature": 0.5, "eos_token_id": [900, 901]})
    write_model(here / "model", files)
    donor = write_model(here / "donor", donor_files(), hidden_size=2 * WIDTH, num_attention_heads=4)
    wide = {n: torch.randn(x.shape[0], *(2 * s for s in x.shape[1:])).bfloat16() for n, x in matrices(donor).items()}
    wide["model.norm.weight"] = torch.ones(2 * WIDTH).bfloat16()
    config = document(donor, "config.json")
    write_checkpoint(donor, wide, config)
    (donor / "generation_config.json").write_text(json.dumps({"eos_token_id": [500, 1], "top_k": 3}))
    return here


def made(folder: Path, method: str, **options: Any) -> dict[str, torch.Tensor]:
    out = folder / f"{method}{len(list(folder.iterdir()))}"
    weightops.vocab(folder / "model", out, tokenizer=folder / "donor", method=method, **options)
    return matrices(out)


def vocabularies(folder: Path) -> tuple[Tokenizer, dict[str, int], dict[str, int]]:
    """The model's tokenizer, the donor's tokens, and the row that each of those has in the model, if it has one."""
    own, new = (Tokenizer.from_file(str(folder / name / "tokenizer.json")) for name in ("model", "donor"))
    same = {text: i for text, i in own.get_vocab().items() if text in new.get_vocab()}
    return (
        own,
        new.get_vocab(),
        same | {"<s>": own.token_to_id("<|endoftext|>"), "<|end|>": own.token_to_id("<|im_end|>")},
    )


def text_of(token: str, folder: Path) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "donor/tokenizer.json"))
    return tokenizer.decode([tokenizer.token_to_id(token)], skip_special_tokens=False)


def test_rows_of_common_tokens_are_carried_to_the_bit(folder: Path) -> None:
    _, tokens, same = vocabularies(folder)
    before, after = matrices(folder / "model"), made(folder, "zero")
    assert 256 < len(same) < len(tokens)
    for name in (EMBEDDING, HEAD):
        assert len(after[name]) == 502
        rows = [tokens[text] for text in same]
        assert torch.equal(after[name][rows], before[name][list(same.values())])
        rest = sorted(set(range(502)) - set(rows))
        assert after[name][rest].count_nonzero() == 0


def test_the_mean_is_over_all_rows(folder: Path) -> None:
    _, tokens, same = vocabularies(folder)
    before, after = matrices(folder / "model"), made(folder, "mean")
    rest = [tokens[text] for text in tokens if text not in same]
    for name in (EMBEDDING, HEAD):
        assert torch.equal(after[name][rest], before[name].double().mean(0).bfloat16().expand(len(rest), -1))


def test_pieces_are_added_up_wide_and_not_in_bfloat16_as_mergekit_does(folder: Path) -> None:
    own, tokens, same = vocabularies(folder)
    before, after = matrices(folder / "model"), made(folder, "subword")
    wrong = 0
    for name in (EMBEDDING, HEAD):
        for token in tokens.keys() - same.keys():
            pieces = own.encode(text_of(token, folder), add_special_tokens=False).ids
            if "\ufffd" in text_of(token, folder):
                continue
            found = after[name][tokens[token]]
            assert torch.equal(found, before[name][pieces].double().mean(0).bfloat16()), token
            theirs = torch.zeros(WIDTH, dtype=torch.bfloat16)
            for piece in pieces:
                theirs += before[name][piece]
            theirs /= len(pieces)
            assert torch.allclose(theirs.float(), found.float(), atol=0.05)
            wrong += not torch.equal(theirs, found)
    assert wrong > 10


def test_parts_of_characters_are_made_of_their_bytes_where_mergekit_takes_the_letters_for_text(tmp_path: Path) -> None:
    text = "日本" * 9
    files: dict[str, Files] = {}
    for name, size in (("model", 257), ("donor", 262)):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator([text], trainer)
        said = dumped({"tokenizer_class": "PreTrainedTokenizerFast"})
        files[name] = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": said}
        write_model(tmp_path / name, files[name])
    weightops.vocab(tmp_path / "model", tmp_path / "out", tokenizer=tmp_path / "donor")
    own, new = (Tokenizer.from_str(files[name]["tokenizer.json"].decode()) for name in ("model", "donor"))
    token = max(new.get_vocab(), key=len)
    letters = own.encode(token, add_special_tokens=False).ids
    pieces = [piece.id for piece in own.model.tokenize(token)]
    assert letters != pieces
    before, after = (matrices(tmp_path / name)[HEAD] for name in ("model", "out"))
    assert torch.equal(after[new.token_to_id(token)], before[pieces].double().mean(0).bfloat16())
    assert not torch.equal(after[new.token_to_id(token)], before[letters].double().mean(0).bfloat16())


def pursued(target: np.ndarray[Any, Any], points: np.ndarray[Any, Any], k: int) -> tuple[list[int], Any]:
    """mergekit's omp, of one row: the largest inner product, then least squares."""
    chosen: list[int] = []
    missing, weights = target, np.empty(0)
    for _ in range(k):
        scores = np.abs(points @ missing)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        weights = np.linalg.lstsq(points[chosen].T, target, rcond=None)[0]
        missing = target - points[chosen].T @ weights
    return chosen, weights


def test_omp_is_the_combination_that_approximates_the_donors_row(folder: Path) -> None:
    _, tokens, same = vocabularies(folder)
    before, donor, after = matrices(folder / "model"), matrices(folder / "donor"), made(folder, "omp", k=6)
    common = sorted(same, key=tokens.__getitem__)
    for name in (EMBEDDING, HEAD):
        points = donor[name][[tokens[text] for text in common]].double().numpy()
        rows = before[name][[same[text] for text in common]].double().numpy()
        wrong = 0
        for token in tokens.keys() - same.keys():
            chosen, weights = pursued(donor[name][tokens[token]].double().numpy(), points, 6)
            expected = torch.from_numpy(weights @ rows[chosen]).bfloat16()
            wrong += not torch.equal(after[name][tokens[token]], expected)
        assert wrong <= 0.03 * (len(tokens) - len(same))
        assert torch.equal(after[name][[tokens[text] for text in same]], before[name][list(same.values())])


def test_a_dry_run_says_what_is_done_omp_what_it_costs_and_refuses_what_has_no_solution(folder: Path) -> None:
    options = {"tokenizer": folder / "donor", "method": "draft", "dry_run": True}
    said = weightops.vocab(folder / "model", folder / "dry", **options).done
    assert "; of heads" in said[-1]
    options = {"tokenizer": folder / "donor", "method": "omp"}
    said = weightops.vocab(folder / "model", folder / "dry", **options, k=4, dry_run=True).warnings
    assert any("multiplications" in text and "passes" in text for text in said)
    assert not any("hours" in text for text in said)
    for k in (0, 16, 400):
        with pytest.raises(UsageError, match="expected 1 to 15"):
            weightops.vocab(folder / "model", folder / "dry", **options, k=k)


def test_draft_models_take_the_last_piece_in_and_the_first_one_out(folder: Path) -> None:
    own, tokens, same = vocabularies(folder)
    marker = own.encode("<|im_end|>user\n", add_special_tokens=False).ids
    before, after = matrices(folder / "model"), made(folder, "draft", override={"<|user|>": "<|im_end|>user\n"})
    several = 0
    for token in [*(tokens.keys() - same.keys() - {"<|user|>"}), "<|user|>"]:
        pieces = marker if token == "<|user|>" else own.encode(text_of(token, folder), add_special_tokens=False).ids
        if "\ufffd" in text_of(token, folder):
            continue
        weights = torch.tensor([0.5**i for i in range(len(pieces))], dtype=torch.float64)
        expected = (before[HEAD][pieces].double() * (weights / weights.sum()).unsqueeze(1)).sum(0)
        assert torch.equal(after[EMBEDDING][tokens[token]], before[EMBEDDING][pieces[-1]]), token
        assert torch.allclose(after[HEAD][tokens[token]].double(), expected, rtol=2**-8, atol=1e-6), token
        several += len(pieces) > 1
    assert several > 30


def test_tokenizer_template_and_every_end_are_the_donors_also_where_mergekit_leaves_the_models(folder: Path) -> None:
    out = folder / "ids"
    weightops.vocab(folder / "model", out, tokenizer=folder / "donor")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder / "donor").get_vocab()
    assert "<|user|>" in tokenizer.chat_template
    config, generation = document(out, "config.json"), document(out, "generation_config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 500, 0)
    theirs = document(folder / "model", "generation_config.json")["eos_token_id"]
    assert generation == {"temperature": 0.5, "eos_token_id": [500, 1], "bos_token_id": 1, "pad_token_id": 0}
    assert generation["eos_token_id"] != theirs  # what a copy of the model's file would say: rows that are not there
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())


def test_a_token_with_two_roles_has_either_where_mergekit_knows_the_first(tmp_path: Path) -> None:
    both = donor_files(bos_token="<|end|>", pad_token=None)
    files = bpe("qwen2", eos_token="<|im_end|>", bos_token=None)
    write_model(tmp_path / "model", files)
    write_model(tmp_path / "donor", both)
    weightops.vocab(tmp_path / "model", tmp_path / "out", tokenizer=tmp_path / "donor", method="zero")
    before, after = (matrices(tmp_path / name)[HEAD] for name in ("model", "out"))
    assert torch.equal(after[500], before[901])  # its first role is bos, which the model has not


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["subword", "draft"])
def test_tokens_of_other_kinds_are_the_same_if_their_text_is(kind: str, method: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", KINDS["BPE of pieces"]())
    donor = write_model(tmp_path / "donor", KINDS[kind]())
    weightops.vocab(source, tmp_path / "out", tokenizer=donor, method=method)
    before, after = (matrices(tmp_path / name)[HEAD] for name in ("model", "out"))
    own, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model", "out"))
    assert len(after) == len(new) == document(tmp_path / "out", "config.json")["vocab_size"]
    start = {"byte BPE": "Ġ", "ranks": "Ġ", "WordPiece": ""}.get(kind, "▁")
    for text in ("the", "ten", "the"):
        wanted, there = new.get_vocab().get(start + text), own.get_vocab().get("▁" + text)
        if wanted is not None and there is not None:
            assert torch.equal(after[wanted], before[there]), text
    assert after.isfinite().all()
    assert not (after == 0).all(1).any()


def test_other_ids_follow_their_tokens_or_are_named(folder: Path, tmp_path: Path) -> None:
    _, tokens, same = vocabularies(folder)
    files = bpe("qwen2", bos_token="<|endoftext|>", eos_token="<|im_end|>")
    there = next(text for text in same if text.isalpha())
    gone = next(i for text, i in json.loads(files["tokenizer.json"])["model"]["vocab"].items() if text not in tokens)
    files["config.json"] = dumped({"suppress_tokens": [same[there], gone], "eos_token_id": 901})
    source = write_model(tmp_path / "model", files)
    said = weightops.vocab(source, tmp_path / "out", tokenizer=folder / "donor").warnings
    assert document(tmp_path / "out", "config.json")["suppress_tokens"] == [tokens[there]]
    assert any("suppress_tokens" in text for text in said)
    write_model(tmp_path / "image", {**files, "config.json": dumped({"image_token_id": gone})})
    with pytest.raises(IncompatibleInputs, match="image_token_id is a token that donor does not have"):
        weightops.vocab(tmp_path / "image", tmp_path / "out2", tokenizer=folder / "donor")


def test_tied_draft_models_have_the_rows_of_an_embedding_which_is_said(folder: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", bpe("qwen2", eos_token="<|im_end|>"), tied=True)
    said = weightops.vocab(source, tmp_path / "out", tokenizer=folder / "donor", method="draft").warnings
    assert any("--untie" in text for text in said)
    assert HEAD not in matrices(tmp_path / "out")


def test_a_donors_code_comes_along(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / "donor" / name).read_bytes())
    config = document(folder / "donor", "tokenizer_config.json")
    config["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_own.py").write_text("class Own: ...\n")
    weightops.vocab(folder / "model", folder / "with code", tokenizer=tmp_path)
    assert (folder / "with code/tokenization_own.py").read_text() == "class Own: ...\n"


def test_the_donors_weights_do_not_matter_where_they_are_not_asked_for(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / "donor" / name).read_bytes())
    after = made(folder, "subword")
    weightops.vocab(folder / "model", folder / "of files", tokenizer=tmp_path)
    assert torch.equal(matrices(folder / "of files")[HEAD], after[HEAD])
    with pytest.raises(UsageError, match="has no tokenizer"):
        weightops.vocab(folder / "model", folder / "none", tokenizer=folder / "of files/..")


def test_a_draft_model_gets_as_many_rows_as_its_target(folder: Path) -> None:
    after = made(folder, "draft", rows=640)
    assert len(after[HEAD]) == len(after[EMBEDDING]) == 640
    before = matrices(folder / "model")[HEAD]
    assert torch.equal(after[HEAD][-1], before.double().mean(0).bfloat16())
