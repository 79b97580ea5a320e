"""Text from a model: greedy as transformers generates it, sampled as it would be drawn there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_tokenizers import mixed_strings
from tiny_models import CONFIGS, save_tiny, save_tokenizer, tiny, trained
from transformers import AutoTokenizer, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from weightops.errors import NoRoom, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference.generate import Generation
from weightops.inference.pieces import pieces
from weightops.inference.sampling import Sampling
from weightops.inference.tokens import load_tokenizer
from weightops.operations.recover import recover

PROMPT = "Streaming tensors,"


def reference(model: PreTrainedModel, count: int, prompt: str = PROMPT) -> list[int]:
    ids = torch.tensor([trained().encode(prompt).ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=1
    )
    return [int(i) for i in out[0, ids.shape[1] :]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = save_tiny(tmp_path, kind)
    expected = reference(model, 40)
    found = Generation(open_checkpoint(tmp_path), PROMPT, max_new_tokens=40)
    said = "".join(found)
    assert found.tokens == expected
    assert not found.streams_weights
    assert said == AutoTokenizer.from_pretrained(tmp_path).decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_layer_by_layer_from_disk_the_tokens_are_the_same(tmp_path: Path, kind: str) -> None:
    model = save_tiny(tmp_path, kind)
    nbytes = sum(p.numel() * 4 for p in {id(p): p for p in model.parameters()}.values())
    found = Generation(open_checkpoint(tmp_path), PROMPT, max_new_tokens=12, max_nbytes=nbytes + (64 << 20))
    list(found)
    assert found.streams_weights
    assert found.tokens == reference(model, 12)
    assert all(p.device.type == "meta" for p in found._model.module.parameters())
    with pytest.raises(NoRoom, match="one block with embedding, head and cache takes"):
        Generation(open_checkpoint(tmp_path), PROMPT, max_nbytes=1 << 20)


def test_sharded_torch_and_lazily_recovered_models_say_the_same(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "torch", "llama")
    expected = reference(model, 20)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    save_tokenizer(tmp_path / "sharded")
    torch.save(model.state_dict(), tmp_path / "torch" / "pytorch_model.bin")
    (tmp_path / "torch" / "model.safetensors").unlink()
    raw = tiny("llama", seed=1)
    raw.save_pretrained(tmp_path / "raw")
    (tmp_path / "diff").mkdir()
    state = {n: (t - raw.state_dict()[n]).contiguous() for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "diff" / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "diff" / name).write_text((tmp_path / "torch" / name).read_text())
    recovered = recover(open_checkpoint(tmp_path / "raw"), open_checkpoint(tmp_path / "diff"))
    for checkpoint in (open_checkpoint(tmp_path / "torch"), open_checkpoint(tmp_path / "sharded"), recovered):
        found = Generation(checkpoint, PROMPT, max_new_tokens=20)
        list(found)
        assert found.tokens == expected, checkpoint.name


def test_it_stops_at_the_end_of_the_text(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    expected = reference(model, 10)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    end = next(token for i, token in enumerate(expected) if i >= 3 and token not in expected[:i])
    (tmp_path / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [1, end]}))
    found = Generation(open_checkpoint(tmp_path), PROMPT, max_new_tokens=10)
    list(found)
    assert found.tokens == expected[: expected.index(end) + 1]
    assert found.finish == "eos"


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    checkpoint = open_checkpoint(tmp_path)

    def drawn(seed: int) -> list[int]:
        found = Generation(checkpoint, PROMPT, max_new_tokens=15, sampling=Sampling(2.0, top_p=0.95, seed=seed))
        list(found)
        return found.tokens

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.floats(0.1, 3),
    st.none() | st.integers(1, 60),
    st.none() | st.floats(0.05, 1),
)
def test_probabilities_are_those_of_transformers_warpers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    ids = torch.zeros(1, 1, dtype=torch.int64)
    expected = TemperatureLogitsWarper(temperature)(ids, logits[None])
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(ids, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    found = Sampling(temperature, top_k, top_p).probabilities(logits)
    assert torch.equal(found, expected[0].softmax(-1))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny(folder, "llama")
    return folder


def test_pieces_are_the_text_without_halves_of_characters(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(tokenizer_folder))
    for text in mixed_strings(150):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found = list(pieces(tokenizer, [0], iter(ids)))
        assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True), repr(text)
        assert not any("\ufffd" in piece for piece in found[:-1]) or "\ufffd" in text


def test_a_chat_prompt_goes_through_the_template(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="no chat template"):
        Generation(checkpoint, PROMPT, chat=True)
    save_tokenizer(tmp_path, chat_template="{{ bos_token }}Q: {{ messages[0]['content'] }}\nA:")
    found = Generation(open_checkpoint(tmp_path), "why?", chat=True, max_new_tokens=8)
    list(found)
    assert found.prompt_tokens == trained().encode("Q: why?\nA:").ids
    assert found.tokens == reference(model, 8, "Q: why?\nA:")


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"made for 128 positions, the prompt has 5[0-9]* tokens and 127 new ones"):
        Generation(checkpoint, "abcd", max_new_tokens=127)
    whole = Generation(checkpoint, "abcd")
    assert sum(1 for _ in whole) >= 1
    assert len(whole.tokens) == 128 - len(whole.prompt_tokens) or whole.finish == "eos"


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 5}, {"temperature": 1.0, "top_p": 1.5}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: Iterator[None]) -> None:
    """Logits of two ways to compute them differ in their last bits where threads split sums otherwise."""
