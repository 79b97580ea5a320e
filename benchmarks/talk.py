"""Speed of `generate` beside transformers' own: `python benchmarks/talk.py`.

Both generate greedily with tests/data/tiny-llama, by turns in one process that has imported everything. The whole call
opens the folder, loads it, reads the prompt and gives the text; a token is the median of those after the first. A
second turn of a conversation shows what the cache of the prompt saves.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench import ratio, write_section
from family import SHAPES, make
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from weightops import api
from weightops.inference.events import Finished, Token

TINY = Path(__file__).parents[1] / "tests" / "data" / "tiny-llama"
REPORT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PROMPT = "Once upon a time there was"


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def step_of(times: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def ours(folder: Path, tokens: int) -> tuple[float, float, list[int]]:
    start = time.perf_counter()
    found = api.generate(folder, PROMPT, max_new_tokens=tokens, device="cpu")
    times = [time.perf_counter() for event in found.events() if isinstance(event, Token)]
    return time.perf_counter() - start, step_of(times), found.tokens


def theirs(folder: Path, tokens: int) -> tuple[float, float, list[int]]:
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    clock = Clock()
    out = model.generate(**given, do_sample=False, max_new_tokens=tokens, streamer=clock)
    said = out[0, given.input_ids.shape[1] :].tolist()
    tokenizer.decode(said, skip_special_tokens=True)
    return time.perf_counter() - start, step_of(clock.times[1:]), said


def second_turn(folder: Path, length: int) -> tuple[float, float]:
    """Seconds until the first token of a prompt of so many tokens, new and as the continuation of one just read."""
    found = []
    prompt = [5 + i % 90 for i in range(length)]
    for first in ([], prompt[: length - 20]):
        with api.open_pool({"tiny": folder}, device="cpu") as pool:
            from weightops.inference.pool import Request
            from weightops.inference.settings import Settings

            for each in (first or [7, 8], prompt):
                *_, last = pool.submit([Request("tiny", each, Settings(1))])
            assert isinstance(last, Finished)
            found.append(last.first_token_s or 0.0)
    return found[0], found[1]


def in_turn(folder: Path, tokens: int, runs: int) -> str:
    """Tokens in a second of four models that are asked at once, to those of one alone; by turns."""
    from weightops.inference.pool import Request
    from weightops.inference.settings import Settings

    rates: tuple[list[float], list[float]] = ([], [])
    names = [f"m{i}" for i in range(4)]
    with api.open_pool(dict.fromkeys(names, folder), device="cpu") as pool:
        for run in range(runs + 1):
            for side, asked in enumerate((names, names[:1])):
                start = time.perf_counter()
                events = pool.submit([Request(name, PROMPT, Settings(tokens)) for name in asked])
                said = sum(event.new_tokens for event in events if isinstance(event, Finished))
                if run:  # the first loads the weights
                    rates[side].append(said / (time.perf_counter() - start))
    return ratio(*rates)


def measure(folder: Path, tokens: int, runs: int) -> list[str]:
    """Rows of one model: ours, transformers', and how many times as fast."""
    rows: dict[str, list[tuple[float, float]]] = {"weightops": [], "transformers": []}
    for _ in range(runs + 1):
        mine, other = ours(folder, tokens), theirs(folder, tokens)
        assert mine[2] == other[2]
        rows["weightops"].append(mine[:2])
        rows["transformers"].append(other[:2])
    columns = {name: [list(each) for each in zip(*found[1:], strict=True)] for name, found in rows.items()}
    medians = {name: [statistics.median(each) for each in found] for name, found in columns.items()}
    times = [ratio(b, a) for a, b in zip(columns["weightops"], columns["transformers"], strict=True)]
    return [
        *(f"| {folder.name}: {name} | {whole:.3f} | {step * 1000:.2f} |" for name, (whole, step) in medians.items()),
        f"| {folder.name}: times as fast | {times[0]} | {times[1]} |",
    ]


def with_tokenizer(folder: Path) -> Path:
    """A model of the 1.1B shape, with the small model's tokenizer, whose numbers it has rows for."""
    if not (folder / "raw/config.json").exists():
        make(SHAPES["1b"], folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / "raw")
    return folder / "raw"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--large", type=Path, help="a folder for a model of the 1.1B shape, which is measured too")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(TINY, options.tokens, options.runs)
    turns = in_turn(TINY, options.tokens, options.runs)
    large = " (of the 1.1B shape 3 runs of 16 tokens)" if options.large else ""
    if options.large:
        rows += measure(with_tokenizer(options.large), 16, 3)
    new, cached = second_turn(TINY, 400)
    lines = [
        "## Text beside transformers",
        "",
        f"Written by `python benchmarks/talk.py`: medians of {options.runs} runs by turns in one process, "
        f"{options.tokens} tokens, {options.threads} threads{large}. The tokens are "
        "transformers' own.",
        "",
        "| | open, load and say it all, s | a token, ms |",
        "|---|---|---|",
        *rows,
        "",
        f"The first token after a prompt of 400 comes after {new * 1000:.0f} ms, as a second turn after "
        f"{cached * 1000:.0f} ms. Four models that answer in turn give so many times the tokens in a second that one "
        f"gives alone: {turns}.",
    ]
    print("\n".join(lines))
    write_section(options.report, "talk", lines)


if __name__ == "__main__":
    main()
