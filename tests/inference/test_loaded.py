"""A model that is loaded once: events, prompts in pieces and from the cache, stop strings, beams, cancelling."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, GEMMA_3N, GEMMA_4, save_tiny, text, trained
from transformers import AutoTokenizer, PreTrainedModel

from weightops.errors import PromptTooLong, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference import forwards
from weightops.inference.events import Event, Finished, Reading, Started, Token
from weightops.inference.loaded import Loaded
from weightops.inference.opened import Opened
from weightops.inference.sampling import Sampling
from weightops.inference.settings import Settings

RECURRENT = {"state_size": 8, "time_step_rank": 4, "hidden_size": 64, "num_hidden_layers": 2}
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in CONFIGS},
    "mamba": RECURRENT,
    "gemma4_text": GEMMA_4,
    "gemma3n_text": GEMMA_3N,
}
TIE = 1e-4
"""Logits this near to one another may change places where sums are made in another order."""


def load(folder: Path, room: int = 1 << 40, **options: Any) -> Loaded:
    opened = Opened(open_checkpoint(folder))
    return Loaded(opened, opened.placement(room, 128), **options)


def finished(events: Iterator[Event]) -> Finished:
    *_, last = events
    assert isinstance(last, Finished)
    return last


def assert_greedy(model: PreTrainedModel, prompt: list[int], tokens: tuple[int, ...]) -> None:
    """Each token is the best after those before it, or as good as the best but for rounding."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert bool((logits.max(-1).values - chosen < TIE).all())


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_pieces_and_from_the_cache_give_the_same_tokens(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path, kind, **KINDS[kind])
    first = trained().encode(text(2)[:80]).ids
    monkeypatch.setattr(forwards, "PIECE", 7)
    with load(tmp_path) as loaded:
        one = finished(loaded.generate(first, Settings(9)))
        assert_greedy(model, first, one.tokens)
        # A second turn, one that parts from the first in its middle, and the first again.
        turn = [*first, *one.tokens, *trained().encode(" the next").ids[1:]]
        parting = [*first[:20], *trained().encode("elsewhere").ids[1:]]
        for prompt in (turn, parting, first):
            found = finished(loaded.generate(prompt, Settings(9)))
            assert_greedy(model, prompt, found.tokens)
            if kind == "llama":
                assert found.cached_tokens > 15


def test_a_long_prompt_is_read_in_pieces_which_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama", eos_token_id=None)
    monkeypatch.setattr(forwards, "PIECE", 10)
    with load(tmp_path) as loaded:
        events = list(loaded.generate(list(range(10, 45)), Settings(2), ends=frozenset(), column=3))
    assert events[0] == Started(column=3, prompt_tokens=35, cached_tokens=0)
    assert events[1:4] == [Reading(column=3, tokens=n, prompt_tokens=35) for n in (10, 20, 30)]
    assert [type(event) for event in events[4:]] == [Token, Token, Finished]
    assert {event.column for event in events} == {3}


def test_the_cache_is_the_longest_common_beginning(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    prompt = list(range(10, 40))
    with load(tmp_path) as loaded:
        found = finished(loaded.generate(prompt, Settings(5)))
        cached = [
            finished(loaded.generate(each, Settings(1))).cached_tokens
            for each in ([*prompt, *found.tokens, 7, 8], prompt, [*prompt[:12], 99, 98], [3, 4])
        ]
    assert cached == [34, 29, 12, 0]  # the last token of a text was never read, nor is a prompt's last cut off


def test_windowed_and_recurrent_caches_begin_anew(tmp_path: Path) -> None:
    for kind in ("qwen2", "mamba"):
        save_tiny(tmp_path / kind, kind, **KINDS[kind])
        prompt = list(range(10, 40))
        with load(tmp_path / kind) as loaded:
            for _ in range(2):
                assert finished(loaded.generate(prompt, Settings(3))).cached_tokens == 0


def test_what_is_said_is_decode_of_the_tokens_and_stops_are_exact(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chance = random.Random(1)
    with load(tmp_path) as loaded:
        for _ in range(30):
            prompt = [chance.randrange(2, 300) for _ in range(8)]
            whole = finished(loaded.generate(prompt, Settings(20)))
            before = tokenizer.decode(prompt, skip_special_tokens=True)
            said = tokenizer.decode([*prompt, *whole.tokens], skip_special_tokens=True)
            assert before.rstrip("\ufffd") + whole.text == said or before + whole.text == said
            start = chance.randrange(max(1, len(whole.text) - 3))
            stop = whole.text[start : start + chance.randint(1, 3)] or "none"
            events = list(loaded.generate(prompt, Settings(20, stop=(stop,))))
            *tokens, last = [event for event in events if isinstance(event, Token | Finished)]
            assert isinstance(last, Finished)
            assert last.finish == ("stop" if whole.text else "eos")
            assert last.text == whole.text.partition(stop)[0]
            assert "".join(token.text for token in tokens if isinstance(token, Token)) == last.text


def test_logprobs_are_the_models_own(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    prompt = list(range(10, 20))
    settings = Settings(6, Sampling(0.7, seed=3, repetition_penalty=1.3), logprobs=4)
    with load(tmp_path) as loaded:
        tokens = [event for event in loaded.generate(prompt, settings) if isinstance(event, Token)]
    ids = [token.id for token in tokens]
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [each.id for each in token.top] == row.topk(4).indices.tolist()
        assert [each.logprob for each in token.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
def test_beams_are_those_of_transformers(tmp_path: Path, beams: int, options: dict[str, Any]) -> None:
    model = save_tiny(tmp_path, "llama")
    prompt = trained().encode("Streaming").ids
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=beams,
        max_new_tokens=12,
        pad_token_id=1,
        **options,
    )
    with load(tmp_path) as loaded:
        found = finished(loaded.generate(prompt, Settings(12, Sampling(**options), num_beams=beams)))
    assert list(found.tokens) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("room", [1 << 40, None])
def test_cancelled_at_any_token_nothing_is_left(tmp_path: Path, room: int | None) -> None:
    save_tiny(tmp_path, "llama")
    opened = Opened(open_checkpoint(tmp_path))
    placement = opened.placement(room or opened.dequantized_nbytes + opened.beside_nbytes(128) - 1, 128)
    assert placement.streams_weights == (room is None)
    prompt = list(range(10, 20))
    whole = finished(Loaded(opened, placement).generate(prompt, Settings(6)))
    for count in range(7):
        with Loaded(opened, placement) as loaded:
            seen: list[Event] = []

            def is_cancelled(seen: list[Event] = seen, count: int = count) -> bool:
                return sum(isinstance(event, Token) for event in seen) >= count

            for event in loaded.generate(prompt, Settings(6), is_cancelled=is_cancelled):
                seen.append(event)
            last = seen[-1]
            assert isinstance(last, Finished)
            assert last.finish == ("cancelled" if count < 6 else whole.finish)
            assert last.tokens == whole.tokens[:count]
        assert all(p.device.type == "meta" for p in opened.model.module.parameters())
        assert loaded.prompts.nbytes == 0


def test_closed_in_the_middle_it_can_be_asked_again(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    prompt = list(range(10, 20))
    with load(tmp_path) as loaded:
        for count in range(1, 6):
            events = loaded.generate(prompt, Settings(8))
            for _ in range(count):
                next(events)
            events.close()  # type: ignore[attr-defined]
            assert_greedy(model, prompt, finished(loaded.generate(prompt, Settings(8))).tokens)


def test_several_texts_in_turn_are_what_they_are_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    prompts = [list(range(10 + 3 * i, 20 + 3 * i)) for i in range(4)]
    with load(tmp_path, kept_prompts=4) as loaded:
        assert not loaded.is_exclusive
        alone = [finished(loaded.generate(prompt, Settings(7))).tokens for prompt in prompts]
        loaded.prompts.clear()
        live = [loaded.generate(prompt, Settings(7), column=i) for i, prompt in enumerate(prompts)]
        found: dict[int, tuple[int, ...]] = {}
        while len(found) < len(live):
            for i, events in enumerate(live):
                event = next(events, None)
                if isinstance(event, Finished):
                    found[i] = event.tokens
    assert [found[i] for i in range(4)] == alone


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with load(tmp_path) as loaded:
        with pytest.raises(PromptTooLong, match="made for 128 positions, the prompt has 120 tokens and 9 new ones"):
            loaded.generate([5] * 120, Settings(9))
        assert finished(loaded.generate([5] * 120)).finish in ("length", "eos")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "0 new tokens are none"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"logprobs": 21}, "log-probabilities of 21 tokens"),
        ({"num_beams": 0}, "0 beams are none"),
        ({"num_beams": 2, "sampling": Sampling(1.0)}, "--temperature has no use with several beams"),
        ({"num_beams": 2, "logprobs": 1}, "--logprobs has no use with several beams"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**options)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """As in test_generate.py."""
