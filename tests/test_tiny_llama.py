"""The trained model under tests/data is whole, small, and has learnt: perplexities taken on it mean something."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from weightops import api

FOLDER = Path(__file__).parent / "data" / "tiny-llama"
SEQ_LEN = 512
EVERY = 5


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """heldout.txt in whole windows [count, SEQ_LEN], tokenised as a whole with one `<s>` in front."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer((FOLDER / "heldout.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    assert [place for place, token in enumerate(ids) if token in tokenizer.all_special_ids] == [0]
    return torch.tensor(ids)[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)


def test_files_are_those_of_the_training_run() -> None:
    report = api.verify(FOLDER, extra="fail")
    assert report.verdict, report
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000


def test_readme_states_the_perplexity_far_below_that_of_token_frequencies(tokens: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    total = 0.0
    with torch.inference_mode():
        for window in tokens[::EVERY]:
            logits = model(input_ids=window[None]).logits[0, :-1]
            total += functional.cross_entropy(logits, window[1:]).item()
    stated, unigram = map(float, re.findall(r"\| (\d+\.\d+) \|", (FOLDER / "README.md").read_text())[:2])
    found = math.exp(total / len(tokens[::EVERY]))
    assert found < unigram / 5
    assert found == pytest.approx(stated, rel=0.02), "of a fifth of the windows"


def test_text_comes_back_from_its_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "And it came to pass  in those days—\n\nnaïve 流 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer) == json.loads((FOLDER / "config.json").read_bytes())["vocab_size"]


def test_calibration_and_held_out_text_share_no_paragraph() -> None:
    held_out, calibration = (
        set((FOLDER / name).read_text(encoding="utf-8").strip().split("\n\n"))
        for name in ("heldout.txt", "calibration.txt")
    )
    assert min(len(held_out), len(calibration)) > 20
    assert not held_out & calibration


def test_every_linear_divides_into_groups_of_128() -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.endswith("_proj.weight")}
    assert len(shapes) == 28
    assert {name for name, (n, k) in shapes.items() if n % 32 or k % 128} == set()
