"""Text from a model: greedy as transformers generates it, sampled as it would be drawn there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import CONFIGS, GEMMA_3N, GEMMA_4, VOCAB, save_tiny, save_tokenizer, tiny, trained
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from weightops.errors import CorruptInput, IncompatibleInputs, NoRoom, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference import tokens
from weightops.inference.generate import Generation
from weightops.inference.prompts import conversation
from weightops.inference.sampling import Sampling
from weightops.inference.settings import Settings
from weightops.inference.tokens import end_tokens
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
    found = Generation(open_checkpoint(tmp_path), PROMPT, settings=Settings(40))
    said = "".join(found)
    assert found.tokens == expected
    assert not found.streams_weights
    assert said == AutoTokenizer.from_pretrained(tmp_path).decode(expected, skip_special_tokens=True)


LONG, SHORT = [1.0, 2.0, 4.0, 8.0, 8.0, 16.0, 16.0, 32.0], [1.0] * 8
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"factor": 4.0}),
    "dynamic": ("llama", {"factor": 4.0}),
    "yarn": ("llama", {"factor": 4.0}),
    "longrope": ("llama", {"factor": 2.0, "short_factor": SHORT, "long_factor": LONG}),
    "llama3": ("llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "proportional": ("llama", {"factor": 2.0, "partial_rotary_factor": 0.5}),
    "longrope of Phi-3": ("phi3", {"short_factor": SHORT, "long_factor": LONG}),
    "longrope of Phi-MoE": (
        "phimoe",
        {"short_factor": SHORT, "long_factor": LONG, "short_mscale": 1.0, "long_mscale": 1.2},
    ),
}


def begins_anew(kind: str, rope: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a model of CONFIGS["llama"] one whose original context is 32 tokens, and which never ends a text."""
    own: dict[str, Any] = {"num_local_experts": 4} if kind == "phimoe" else {}
    parameters = {"rope_type": rope.split()[0], "rope_theta": 1e4, "original_max_position_embeddings": 32, **settings}
    own |= {"original_max_position_embeddings": 32, "rope_parameters": parameters, "eos_token_id": VOCAB}
    return {**CONFIGS["llama"], **own}


@pytest.mark.parametrize("rope", ROPES)
def test_greedy_tokens_are_those_of_transformers_beyond_the_original_context(tmp_path: Path, rope: str) -> None:
    kind, settings = ROPES[rope]
    model = save_tiny(tmp_path, kind, **begins_anew(kind, rope, settings))
    prompt = PROMPT[:9]
    expected = reference(model, 32, prompt)
    little = sum(p.numel() * 4 for p in model.parameters()) + (64 << 20)
    for nbytes in (None, little):
        found = Generation(open_checkpoint(tmp_path), prompt, settings=Settings(32), max_nbytes=nbytes)
        list(found)
        assert found.streams_weights == (nbytes is not None)
        assert len(found.prompt_tokens) < 32 < len(found.prompt_tokens) + len(expected)
        assert found.tokens == expected


RECURRENT = {"state_size": 8, "time_step_rank": 4, "hidden_size": 64, "num_hidden_layers": 2}
MAMBA_2 = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16}
CACHES: dict[str, dict[str, Any]] = {
    "mamba": RECURRENT,
    "mamba2": RECURRENT | MAMBA_2,
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "sliding_window": None},
    "gemma4_text": GEMMA_4,
    "gemma3n_text": GEMMA_3N,
}


@pytest.mark.parametrize("kind", CACHES)
def test_so_are_those_of_models_with_caches_of_their_own(tmp_path: Path, kind: str) -> None:
    model = save_tiny(tmp_path, kind, **CACHES[kind])
    expected = reference(model, 30)
    found = Generation(open_checkpoint(tmp_path), PROMPT, settings=Settings(30))
    list(found)
    assert found.tokens == expected


@pytest.mark.parametrize("pad", [0, 1, 52])
def test_a_prompt_that_holds_the_pad_token_is_no_shorter_for_it(tmp_path: Path, pad: int) -> None:
    """Token 0 is bos, token 52 the first of the prompt."""
    model = save_tiny(tmp_path, "llama", pad_token_id=pad)
    found = Generation(open_checkpoint(tmp_path), PROMPT, settings=Settings(10))
    list(found)
    assert found.prompt_tokens[:2] == [0, 52]
    assert found.tokens == reference(model, 10)


@pytest.mark.parametrize("literal", ["Infinity", '{"__float__": "Infinity"}'])
def test_infinity_in_config_json_is_read_as_transformers_4_and_5_write_it(tmp_path: Path, literal: str) -> None:
    model = save_tiny(tmp_path, "mamba2", **CACHES["mamba2"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["time_step_limit"]
    text = json.dumps(config).removesuffix("}") + f', "time_step_limit": [0.0, {literal}]}}'
    (tmp_path / "config.json").write_text(text)
    found = Generation(open_checkpoint(tmp_path), PROMPT, settings=Settings(5))
    list(found)
    assert found.tokens == reference(model, 5)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_layer_by_layer_from_disk_the_tokens_are_the_same(tmp_path: Path, kind: str) -> None:
    model = save_tiny(tmp_path, kind)
    nbytes = sum(p.numel() * 4 for p in {id(p): p for p in model.parameters()}.values())
    found = Generation(open_checkpoint(tmp_path), PROMPT, settings=Settings(12), max_nbytes=nbytes + (64 << 20))
    list(found)
    assert found.streams_weights
    assert found.tokens == reference(model, 12)
    assert all(p.device.type == "meta" for p in found._opened.model.module.parameters())
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
        found = Generation(checkpoint, PROMPT, settings=Settings(20))
        list(found)
        assert found.tokens == expected, checkpoint.name


def test_it_stops_at_the_end_of_the_text(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    expected = reference(model, 10)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    end = next(token for i, token in enumerate(expected) if i >= 3 and token not in expected[:i])
    (tmp_path / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [1, end]}))
    found = Generation(open_checkpoint(tmp_path), PROMPT, settings=Settings(10))
    list(found)
    assert found.tokens == expected[: expected.index(end) + 1]
    assert found.finish == "eos"


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ends", ["</s>", True, 2.0, [1, "</s>"], {"id": 1}, [None], [[1]]])
def test_ends_that_are_no_numbers_of_tokens_are_refused(tmp_path: Path, file: str, ends: object) -> None:
    save_tiny(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("generation_config.json", "config.json"):
        config = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**config, "eos_token_id": ends if name == file else None}))
    words = rf"{file}: eos_token_id is .*, expected the number of a token or a list of such"
    with pytest.raises(CorruptInput, match=words) as caught:
        end_tokens(open_checkpoint(tmp_path), tokenizer)
    assert caught.value.hint == ('write 1, which is the number of "</s>"' if "</s>" in str(ends) else NUMBER_HINT)


NUMBER_HINT = "write the token's number there, or null for the tokenizer's own end"


@pytest.mark.parametrize(("ends", "expected"), [(None, {1}), (7, {7}), ([7, 9], {7, 9}), ([], set())])
def test_ends_are_those_of_the_first_file_that_names_some(tmp_path: Path, ends: object, expected: set[int]) -> None:
    save_tiny(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("generation_config.json", "config.json"):
        config = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**config, "eos_token_id": ends}))
        ends = None if ends is None else 3
    assert end_tokens(open_checkpoint(tmp_path), tokenizer) == expected
    assert end_tokens(open_checkpoint(tmp_path), tokenizer, chat=True) == expected | {1}


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    checkpoint = open_checkpoint(tmp_path)

    def drawn(seed: int) -> list[int]:
        found = Generation(checkpoint, PROMPT, settings=Settings(15, Sampling(2.0, top_p=0.95, seed=seed)))
        list(found)
        return found.tokens

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_chat_prompt_goes_through_the_template(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="no chat template"):
        Generation(checkpoint, conversation(PROMPT))
    save_tokenizer(tmp_path, chat_template="{{ bos_token }}Q: {{ messages[0]['content'] }}\nA:")
    found = Generation(open_checkpoint(tmp_path), conversation("why?"), settings=Settings(8))
    list(found)
    assert found.prompt_tokens == trained().encode("Q: why?\nA:").ids
    assert found.tokens == reference(model, 8, "Q: why?\nA:")


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"made for 128 positions, the prompt has 5[0-9]* tokens and 127 new ones"):
        Generation(checkpoint, "abcd", settings=Settings(127))
    whole = Generation(checkpoint, "abcd")
    assert sum(1 for _ in whole) >= 1
    assert len(whole.tokens) == 128 - len(whole.prompt_tokens) or whole.finish == "eos"


def test_in_float16_the_error_says_that_values_between_layers_are_too_large(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    with torch.no_grad():
        for name, factor in (("up", 3e3), ("gate", 3e2), ("down", 3e2)):
            model.get_parameter(f"model.layers.0.mlp.{name}_proj.weight").mul_(factor)
    model.bfloat16().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    list(Generation(checkpoint, PROMPT, settings=Settings(2), dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="NaN or infinity in float16, which ends at 65504: what passes") as caught:
        list(Generation(checkpoint, PROMPT, settings=Settings(2), dtype=torch.float16))
    assert caught.value.hint is not None
    assert "--dtype bfloat16 or float32" in caught.value.hint
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = 7e4
    model.save_pretrained(tmp_path)
    with pytest.raises(CorruptInput, match=r"infinity, as model\.layers\.1\.mlp\.up_proj\.weight does in float16"):
        list(Generation(open_checkpoint(tmp_path), PROMPT, settings=Settings(2), dtype=torch.float16))


def test_a_lora_is_refused_with_the_verb_that_makes_a_model_of_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(IncompatibleInputs, match="is a LoRA adapter, not a model") as caught:
        Generation(open_checkpoint(tmp_path), PROMPT)
    assert caught.value.hint is not None
    assert "weightops merge-lora" in caught.value.hint


def test_a_tokenizer_for_which_transformers_lacks_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0e no such thing")
    monkeypatch.setattr(tokens, "_is_installed", lambda library: library != "protobuf")
    with pytest.raises(UsageError, match=r"reads tokenizer\.model with protobuf, which is not installed") as caught:
        Generation(open_checkpoint(tmp_path), PROMPT)
    assert caught.value.hint == "pip install protobuf"
    monkeypatch.setattr(tokens, "_is_installed", lambda _: True)
    with pytest.raises(CorruptInput, match="transformers cannot read its tokenizer"):
        Generation(open_checkpoint(tmp_path), PROMPT)


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_without_a_token_and_prompts_that_are_no_text_are_refused(tmp_path: Path, chat: bool) -> None:
    save_tiny(tmp_path, "llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), chat_template="{{ messages[0].content }}")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="the prompt is empty, and the tokenizer begins with no special token"):
        Generation(open_checkpoint(tmp_path), conversation("") if chat else "")
    with pytest.raises(UsageError, match="the prompt is not text in UTF-8"):
        Generation(open_checkpoint(tmp_path), conversation("\udce4") if chat else "\udce4")


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 5}, {"temperature": 1.0, "top_p": 1.5}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"draws nothing|a share of 1.5|nothing is drawn"):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: Iterator[None]) -> None:
    """Logits of two ways to compute them differ in their last bits where threads split sums otherwise."""
