"""Several models in one pool: the right texts, within the memory, by turns; nothing left when somebody goes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tiny_models import quantize_tiny, save_tiny, trained

from weightops.errors import UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference.events import Event, Failed, Finished, Started, Token, Waiting
from weightops.inference.generate import Generation
from weightops.inference.opened import Opened
from weightops.inference.pool import Pool, Request, Stoppable
from weightops.inference.settings import Settings

PROMPTS = ["Streaming tensors,", "the weights", "once upon"]
COUNT = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(4):
        save_tiny(folder / str(seed), "llama", seed, eos_token_id=None)
    return [folder / str(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> dict[tuple[str, str], str]:
    return {
        (folder.name, prompt): "".join(Generation(open_checkpoint(folder), prompt, settings=Settings(COUNT)))
        for folder in folders
        for prompt in PROMPTS
    }


def opened(folders: Sequence[Path]) -> dict[str, Opened]:
    return {folder.name: Opened(open_checkpoint(folder), control=Stoppable()) for folder in folders}


def held(models: dict[str, Opened]) -> int:
    """Bytes of all weights that are in memory."""
    parameters = {id(p): p for each in models.values() for p in each.model.module.parameters()}
    return sum(p.nbytes for p in parameters.values() if p.device.type != "meta")


def asked(*pairs: tuple[str, str], count: int = COUNT) -> list[Request]:
    return [Request(model, prompt, Settings(count)) for model, prompt in pairs]


def texts(events: Sequence[Event]) -> dict[int, str]:
    return {event.column: event.text for event in events if isinstance(event, Finished)}


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("share", [100.0, 2.4, 1.2])
def test_four_models_say_what_they_say_alone_and_the_bound_holds(
    folders: list[Path], expected: dict[tuple[str, str], str], share: float
) -> None:
    models = opened(folders)
    one, beside = models["0"].dequantized_nbytes, models["0"].beside_nbytes(COUNT + 20)
    room = int(share * one) + beside * (12 if share > 4 else 1)
    pairs = [(name, prompt) for prompt in PROMPTS for name in models]
    seen: list[Event] = []
    most, done = [0, 0, 0], threading.Event()

    with Pool(models, room) as pool:

        def deliver(event: Event) -> None:
            most[0], most[1] = max(most[0], held(models)), max(most[1], pool.nbytes)
            most[2] = max(most[2], len(pool.loaded))
            seen.append(event)
            if len(texts(seen)) == len(pairs):
                done.set()

        found = pool.submit(asked(*pairs), deliver)
        assert done.wait(60)
        assert texts(seen) == {i: expected[pair] for i, pair in enumerate(pairs)}
        assert most[0] <= room - beside
        assert most[1] <= room
        assert most[2] == (4 if share > 4 else 2 if share > 2 else 1)
        assert (pool.live, pool.waiting) == (0, 0)
        assert any(isinstance(event, Waiting) and event.reason == "memory" for event in seen) == (share < 4)
        del found
    assert held(models) == 0
    assert pool.nbytes == 0


def test_texts_of_models_in_memory_come_by_turns(folders: list[Path]) -> None:
    tokens = columns_of_five(folders, turn_s=0)
    assert [set(tokens[i : i + 5]) for i in range(0, 5 * COUNT, 5)] == COUNT * [set(range(5))]


def test_a_turn_lasts_several_tokens_but_none_waits_for_a_first_one(folders: list[Path]) -> None:
    tokens = columns_of_five(folders, turn_s=1e9)
    assert set(tokens[:5]) == set(range(5))
    assert [len(set(tokens[i : i + COUNT - 1])) for i in range(5, 5 * COUNT, COUNT - 1)] == 5 * [1]


def columns_of_five(folders: list[Path], turn_s: float) -> list[int]:
    """Whose the tokens are, one after the other, of five texts of four models that are asked for at once."""
    with Pool(opened(folders), 1 << 32, turn_s=turn_s) as pool:
        list(pool.submit(asked(*((name, PROMPTS[0]) for name in pool.names))))  # now all are loaded
        events = list(pool.submit(asked(*((name, PROMPTS[1]) for name in pool.names), ("0", PROMPTS[2]))))
    return [event.column for event in events if isinstance(event, Token)]


def test_one_that_does_not_fit_alone_runs_packed_or_from_disk(tmp_path: Path) -> None:
    save_tiny(tmp_path / "full", "llama", eos_token_id=None)
    quantize_tiny(tmp_path / "full", tmp_path / "quantized")
    models = opened([tmp_path / "full", tmp_path / "quantized"])
    whole = models["full"].dequantized_nbytes
    room = whole - 1 + models["full"].beside_nbytes(COUNT + 20)
    alone = {
        name: "".join(Generation(open_checkpoint(tmp_path / name), PROMPTS[0], settings=Settings(COUNT)))
        for name in models
    }
    with Pool(models, room) as pool:
        plan = {each.name: each for each in pool.plan(COUNT + 20)}
        assert (plan["full"].streams_weights, plan["full"].stays) == (True, False)
        assert (plan["quantized"].is_packed, plan["quantized"].streams_weights) == (True, False)
        pairs = [("full", PROMPTS[0]), ("quantized", PROMPTS[0]), ("full", PROMPTS[0])]
        found = texts(list(pool.submit(asked(*pairs))))
    assert found == {i: alone[name] for i, (name, _) in enumerate(pairs)}


def test_what_is_wrong_with_one_request_is_its_own_last_event(
    folders: list[Path], expected: dict[tuple[str, str], str]
) -> None:
    with Pool(opened(folders[:1]), 1 << 32) as pool:
        events = list(pool.submit(asked(("0", "x" * 500), ("0", PROMPTS[0]), ("0", "\udce4"))))
        with pytest.raises(UsageError, match="there is no model other"):
            pool.submit(asked(("other", "x")))
    errors = {event.column: event for event in events if isinstance(event, Failed)}
    assert texts(events) == {1: expected["0", PROMPTS[0]]}
    assert errors.keys() == {0, 2}
    assert errors[0].error == "PromptTooLong"
    assert "was made for 128 positions" in errors[0].message
    assert errors[0].code == 2
    with pytest.raises(UsageError, match="closed already"):
        pool.submit(asked(("0", "x")))


@pytest.mark.parametrize("leave", ["close", "cancel", "forget"])
def test_whoever_goes_at_any_token_leaves_nothing(folders: list[Path], leave: str) -> None:
    models = opened(folders[:2])
    with Pool(models, 1 << 32) as pool:
        for count in range(0, 12, 2):
            found = pool.submit(asked(("0", PROMPTS[0]), ("1", PROMPTS[1]), count=100))
            events = iter(found)
            for _ in range(count):
                next(events)
            if leave == "close":
                events.close()  # type: ignore[attr-defined]
            if leave == "cancel":
                found.cancel()
                assert sorted(texts(list(events))) == [0, 1]
            del found, events
            gc.collect()
            wait_for(lambda: pool.live == pool.waiting == 0)
        weights = sum(each.dequantized_nbytes for each in models.values())
        kept = pool.nbytes - weights
        assert 0 <= kept < 2 * 4 * models["0"].beside_nbytes(128)
    assert held(models) == pool.nbytes == 0


def test_a_column_is_cancelled_alone_and_keeps_what_was_said(folders: list[Path]) -> None:
    with Pool(opened(folders[:2]), 1 << 32) as pool:
        found = pool.submit(asked(("0", PROMPTS[0]), ("1", PROMPTS[0]), count=60))
        said = {0: "", 1: ""}
        finishes = {}
        for event in found:
            if isinstance(event, Token):
                said[event.column] += event.text
                if event.column == 0:
                    found.cancel(0)
            if isinstance(event, Finished):
                finishes[event.column] = event
    assert finishes[0].finish == "cancelled"
    assert 1 <= len(finishes[0].tokens) < 60
    assert finishes[1].finish == "length"
    assert {column: event.text for column, event in finishes.items()} == said


def test_a_second_turn_reads_only_what_is_new(folders: list[Path]) -> None:
    prompt = trained().encode("a long history " * 5).ids
    with Pool(opened(folders[:1]), 1 << 32) as pool:
        requests = [Request("0", prompt, Settings(5)), Request("0", [*prompt, 9, 10, 11], Settings(5))]
        for request, cached in zip(requests, (0, len(prompt)), strict=True):
            events = list(pool.submit([request]))
            started = next(event for event in events if isinstance(event, Started))
            assert started.cached_tokens == cached


def test_many_clients_at_once(folders: list[Path], expected: dict[tuple[str, str], str]) -> None:
    failures: list[object] = []

    def ask(pool: Pool, name: str) -> None:
        for prompt in PROMPTS:
            found = texts(list(pool.submit(asked((name, prompt)))))
            if found != {0: expected[name, prompt]}:
                failures.append((name, prompt, found))

    with Pool(opened(folders), 1 << 32) as pool:
        threads = [threading.Thread(target=ask, args=(pool, name)) for name in [*pool.names, *pool.names]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_closing_ends_what_is_at_work(folders: list[Path]) -> None:
    models = opened(folders[:1])
    pool = Pool(models, 1 << 32)
    found = pool.submit(asked(("0", PROMPTS[0]), count=100))
    events = iter(found)
    while not isinstance(next(events), Token):
        pass
    pool.close()
    *_, last = events
    assert isinstance(last, Finished)
    assert last.finish == "cancelled"
    assert held(models) == 0


@pytest.fixture(autouse=True)
def _one_thread(one_thread: Iterator[None]) -> None:
    """As in test_generate.py."""
