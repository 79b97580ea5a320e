"""Perplexity by its stated convention, and distances from a reference."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, save_tiny, save_tokenizer, text, trained
from transformers import AutoTokenizer

from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference.evaluate import evaluate

SEQ_LEN = 32


def windows(ids: list[int]) -> torch.Tensor:
    count = len(ids) // SEQ_LEN
    return torch.tensor(ids[: count * SEQ_LEN]).view(count, SEQ_LEN)


TEXT = text(25)
WINDOWS = windows(trained().encode(TEXT).ids)


@torch.no_grad()
def plain(model: torch.nn.Module, windows: torch.Tensor = WINDOWS) -> torch.Tensor:
    """Log-probabilities [windows, seq_len, vocab], window by window."""
    return torch.stack([model(window[None], use_cache=False).logits[0].log_softmax(-1) for window in windows])


def plain_nll(logs: torch.Tensor, windows: torch.Tensor = WINDOWS) -> float:
    return -float(logs[:, :-1].gather(2, windows[:, 1:, None]).double().mean())


@pytest.mark.parametrize("kind", ["llama", "bloom", "qwen2"])
def test_perplexity_is_that_of_a_plain_loop(tmp_path: Path, kind: str) -> None:
    model = save_tiny(tmp_path, kind)
    # transformers cuts words its own way for qwen2, whatever the files say.
    cut = windows(AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids)
    assert cut.numel() < len(AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids)  # something is dropped
    expected = plain_nll(plain(model, cut), cut)
    (score,) = evaluate([open_checkpoint(tmp_path)], TEXT, seq_len=SEQ_LEN).scores
    assert score.nll == pytest.approx(expected, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (score.windows, score.tokens) == (len(cut), cut.numel())


def test_agreement_is_that_of_whole_distributions(tmp_path: Path) -> None:
    left = plain(save_tiny(tmp_path / "left", "llama"))
    right = plain(save_tiny(tmp_path / "right", "llama", seed=1))
    divergence = (left.exp() * (left - right)).sum(-1)
    found = evaluate(
        [open_checkpoint(tmp_path / "right"), open_checkpoint(tmp_path / "left")],
        TEXT,
        seq_len=SEQ_LEN,
        reference=open_checkpoint(tmp_path / "left"),
    )
    assert [score.name for score in found.scores] == ["left", "right", "left"]
    reference, other, same = (score.agreement for score in found.scores)
    assert reference is None
    assert other is not None
    assert other.kl_mean == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert other.kl_max == pytest.approx(float(divergence.max()), rel=1e-5)
    assert other.top1 == pytest.approx(float((left.argmax(-1) == right.argmax(-1)).double().mean()))
    assert other.top1 < 1
    assert same is not None
    assert (same.kl_mean, same.kl_max, same.top1) == (0, 0, 1)
    assert found.scores[1].nll == pytest.approx(plain_nll(right), rel=1e-6)
    worst = other.divergence.worst[0]
    place = divmod(worst.index - 1, SEQ_LEN)
    assert float(divergence[place]) == pytest.approx(worst.kl, rel=1e-4) == pytest.approx(other.kl_max)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "left")
    assert worst.context.endswith(tokenizer.decode([int(WINDOWS[place])]))
    assert worst.of_reference.text == tokenizer.decode([int(left[place].argmax())])
    if place[1] + 1 < SEQ_LEN:
        assert worst.expected == tokenizer.decode([int(WINDOWS[place[0], place[1] + 1])])


def test_states_in_a_file_and_logits_in_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    checkpoint = open_checkpoint(tmp_path)
    in_memory = evaluate([checkpoint], TEXT, seq_len=SEQ_LEN).scores[0]
    mapped = []
    of = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args, **more: mapped.append(args) or of(*args, **more))
    monkeypatch.setattr("weightops.inference.evaluate._LOGITS_NBYTES", 4 * VOCAB * 5)
    in_file = evaluate([checkpoint], TEXT, seq_len=SEQ_LEN, max_nbytes=1).scores[0]
    assert len(mapped) == 1
    assert in_file.nll == pytest.approx(in_memory.nll, rel=1e-7)


def test_the_convention_says_what_becomes_of_the_bos(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    found = evaluate([open_checkpoint(tmp_path)], TEXT, seq_len=SEQ_LEN)
    assert "first window alone begins with a bos" in found.convention
    assert json.loads(json.dumps(found.to_json()))["models"][0]["perplexity"] == found.scores[0].perplexity
    assert evaluate([open_checkpoint(tmp_path)], TEXT * 2).seq_len == 128  # what the model was made for


def test_bad_input_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    checkpoint = open_checkpoint(tmp_path / "model")
    with pytest.raises(UsageError, match="the text has 3 tokens for model, one window is to have 32"):
        evaluate([checkpoint], "ab", seq_len=32)
    with pytest.raises(UsageError, match="made for 128 positions, a window is to have 129"):
        evaluate([checkpoint], TEXT, seq_len=129)
    shutil.copytree(tmp_path / "model", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(SourceMissing, match="mute: has no tokenizer"):
        evaluate([open_checkpoint(tmp_path / "mute")], TEXT, seq_len=32)
    save_tiny(tmp_path / "small", "llama", vocab_size=300)
    save_tokenizer(tmp_path / "small")
    with pytest.raises(IncompatibleInputs, match=r"its tokenizer has 320 tokens .* its embedding has 300 rows"):
        evaluate([open_checkpoint(tmp_path / "small")], TEXT, seq_len=32)
    save_tiny(tmp_path / "large", "llama", vocab_size=330)
    with pytest.raises(IncompatibleInputs, match="large: has a vocabulary of 330 tokens, the reference model of 320"):
        evaluate([open_checkpoint(tmp_path / "large")], TEXT, seq_len=32, reference=checkpoint)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("model.embed_tokens.weight", "the embedding gives NaN"),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1 gives NaN"),
        ("lm_head.weight", "logits hold NaN"),
    ],
)
def test_nan_is_named_where_it_comes_from(tmp_path: Path, tensor: str, words: str) -> None:
    save_tiny(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    state[tensor][:, 5] = math.nan
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptInput, match=words):
        evaluate([open_checkpoint(tmp_path)], TEXT, seq_len=SEQ_LEN)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: Iterator[None]) -> None:
    """Sums in one order."""
