"""How a token is chosen: transformers' processors are the oracle, and OpenAI's definition where they have none."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny, trained
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from weightops.errors import UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference.generate import Generation
from weightops.inference.sampling import Chooser, Sampling
from weightops.inference.settings import Settings

VOCAB = 12


@given(
    st.integers(0, 2**32),
    st.floats(0.1, 3),
    st.none() | st.integers(1, 12),
    st.none() | st.floats(0.05, 1),
    st.none() | st.floats(0, 1),
)
def test_what_is_drawn_from_is_what_transformers_warpers_leave(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None else []
    warpers += [MinPLogitsWarper(min_p)] if min_p is not None else []
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].softmax(-1)
    assert torch.equal(Sampling(temperature, top_k, top_p, min_p=min_p).probabilities(logits), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("size", [None, 2, 3])
def test_penalties_are_those_of_transformers(penalty: float, size: int | None) -> None:
    chance = random.Random(1)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors += [NoRepeatNGramLogitsProcessor(size)] if size is not None else []
    for seed in range(20):
        prompt = [chance.randrange(VOCAB) for _ in range(chance.randint(1, 9))]
        chooser = Chooser(Sampling(repetition_penalty=penalty, no_repeat_ngram_size=size), prompt)
        text = list(prompt)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(25):
            logits = torch.randn(VOCAB, generator=draw) * 2
            scores = processors(torch.tensor([text]), logits[None].clone())[0]
            token = chooser.choose(logits)
            assert token == int(scores.argmax())
            text.append(token)


@pytest.mark.parametrize(("presence", "frequency"), [(0.8, 0.0), (0.0, 0.5), (1.0, -0.3), (-0.5, 0.9)])
def test_presence_and_frequency_count_new_tokens_alone(presence: float, frequency: float) -> None:
    """logits[j] -= count[j] * frequency + (count[j] > 0) * presence, as OpenAI's API documents it."""
    prompt = list(range(VOCAB))
    chooser = Chooser(Sampling(presence_penalty=presence, frequency_penalty=frequency), prompt)
    counts: Counter[int] = Counter()
    draw = torch.Generator().manual_seed(3)
    for _ in range(60):
        logits = torch.randn(VOCAB, generator=draw)
        expected = logits.clone()
        for token, count in counts.items():
            expected[token] -= count * frequency + presence
        token = chooser.choose(logits)
        assert token == int(expected.argmax())
        counts[token] += 1


def test_a_whole_text_with_penalties_is_that_of_transformers(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    ids = torch.tensor([trained().encode("Streaming").ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=1,
        repetition_penalty=1.4,
        no_repeat_ngram_size=3,
    )
    sampling = Sampling(repetition_penalty=1.4, no_repeat_ngram_size=3)
    found = Generation(open_checkpoint(tmp_path), "Streaming", settings=Settings(40, sampling))
    list(found)
    assert found.tokens == out[0, ids.shape[1] :].tolist()


def test_where_every_token_would_repeat_it_says_so() -> None:
    chooser = Chooser(Sampling(no_repeat_ngram_size=1), range(VOCAB))
    with pytest.raises(UsageError, match="every token would repeat a run of 1 tokens"):
        chooser.choose(torch.zeros(VOCAB))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": float("nan")}, "a temperature of nan"),
        ({"temperature": 1.0, "top_k": 0}, "the 0 most probable tokens"),
        ({"temperature": 1.0, "min_p": 1.5}, "a share of 1.5"),
        ({"min_p": 0.5}, "nothing is drawn"),
        ({"repetition_penalty": 0.0}, "a repetition penalty of 0.0"),
        ({"presence_penalty": float("inf")}, "a presence penalty of inf"),
        ({"frequency_penalty": float("nan")}, "a frequency penalty of nan"),
        ({"no_repeat_ngram_size": 0}, "runs of 0 tokens"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampling(**options)  # type: ignore[arg-type]
