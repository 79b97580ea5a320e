"""GGUF files in llama.cpp itself: texts cut as the tokenizer cuts them, and greedy tokens up to the model's own end."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import environment, run_script
from gguf_models import TINY_LLAMA
from sentencepiece import SentencePieceProcessor
from small_tokenizers import mixed_strings
from tokenizer_folders import CHATML, ENDS, KINDS, STARTS, Files, spm_converted
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from weightops import api

LLAMACPP = environment("llamacpp")
CHATS = [
    f"<|im_start|>user\n{text}<|im_end|>\n" for text in ("tensor streaming", "\u6d41\u5f0f, 128 GB?", "def read():")
]
_TIE = 0.1
"""Logits that are no farther apart may change places when activations are rounded to 8 bits."""
TEXTS = [text for text in mixed_strings() if "<|" not in text]


def save(folder: Path, files: Files, rows: int) -> LlamaForCausalLM:
    """A folder with these files and a small model of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, num_key_value_heads=2, max_position_embeddings=256, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    ids = json.loads(files["config.json"])
    for name in ("bos_token_id", "eos_token_id"):
        setattr(model.config, name, ids.get(name))
        setattr(model.generation_config, name, ids.get(name))
    write(folder, model, files)
    return model


def write(folder: Path, model: LlamaForCausalLM, files: Files) -> None:
    model.save_pretrained(folder)
    for name, data in files.items():
        if name not in ("config.json", "generation_config.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)


def reference(folder: Path, files: Files) -> PreTrainedTokenizerBase:
    """transformers' tokenizer; of a tokenizer.model alone, with ChatML's tokens, that of a folder converted from it."""
    if "tokenizer.json" not in files:
        folder = folder.with_name("converted")
        folder.mkdir()
        for name, data in spm_converted(tokens=(ENDS, STARTS)).items():
            (folder / name).write_bytes(data)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


def ask(folder: Path, out: Path, **asked: list[str]) -> dict[str, Any]:
    """What llama.cpp answers of the folder's model as GGUF."""
    api.convert(folder, out, to="gguf", dtype="float32")
    question = out.with_suffix(".json")
    question.write_text(json.dumps({"texts": [], "prompts": [], **asked}))
    return json.loads(run_script(LLAMACPP, "llamacpp_greedy.py", out, question))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece with ChatML", "sentencepiece as tokenizer.json", "Qwen 2"])
def test_greedy_tokens_and_ends_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    make, _, rows = KINDS[kind]
    model = save(tmp_path / "hf", make(), rows)
    tokenizer = reference(tmp_path / "hf", make())
    assert isinstance(tokenizer.eos_token_id, int)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in CHATS]

    def generate(prompt: torch.Tensor) -> list[int]:
        made = model.generate(prompt, max_new_tokens=60, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        return [int(token) for token in made[0, prompt.shape[1] :]]

    # The token that comes first at some step gives its place in the head to the end of a text.
    for prompt in prompts:
        answer = generate(prompt)
        fresh = [i for i, token in enumerate(answer) if token not in answer[:i]]
        rows_of_head = [answer[fresh[len(fresh) // 2]], tokenizer.eos_token_id]
        with torch.no_grad():
            model.lm_head.weight[rows_of_head] = model.lm_head.weight[rows_of_head[::-1]]
    write(tmp_path / "hf", model, make())
    expected = [generate(prompt) for prompt in prompts]
    assert any(answer[-1] == tokenizer.eos_token_id and len(answer) > 1 for answer in expected)

    found = ask(tmp_path / "hf", tmp_path / "model.gguf", prompts=CHATS)
    assert [each["prompt"] for each in found["answers"]] == [prompt[0].tolist() for prompt in prompts]
    assert [each["answer"] for each in found["answers"]] == expected
    assert found["eos"] == tokenizer.eos_token_id
    assert found["template"] == CHATML


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["q4_k_m", "q6_k", "q8_0"])
def test_a_quantised_file_answers_as_the_weights_that_it_stands_for(tmp_path: Path, dtype: str) -> None:
    """The trained model's answers, but for what llama.cpp may turn by rounding what goes into a layer to 8 bits."""
    lines = (TINY_LLAMA / "heldout.txt").read_text().splitlines()
    prompts = [line[:60] for line in lines if len(line) > 60][:12]
    api.convert(TINY_LLAMA, tmp_path / "model.gguf", to="gguf", dtype=dtype)
    api.convert(tmp_path / "model.gguf", tmp_path / "back", to="hf", dtype="float32")
    (tmp_path / "asked.json").write_text(json.dumps({"texts": [], "prompts": prompts}))
    found = json.loads(run_script(LLAMACPP, "llamacpp_greedy.py", tmp_path / "model.gguf", tmp_path / "asked.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    alike = list[bool]()
    for each in found["answers"]:
        tokens = torch.tensor([each["prompt"] + each["answer"]])
        with torch.no_grad():
            best = model(tokens).logits[0, len(each["prompt"]) - 1 : -1].topk(2)
        same = best.indices[:, 0] == torch.tensor(each["answer"])
        assert all(best.values[~same, 0] - best.values[~same, 1] < _TIE), "another token, and not by a rounding"
        alike += same.tolist()
    assert sum(alike) > 0.95 * len(alike)
    print(f"{sum(alike)} of {len(alike)} tokens")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sentencepiece with tokens of users"])
def test_texts_are_cut_as_the_tokenizer_cuts_them(tmp_path: Path, kind: str) -> None:
    make, _, rows = KINDS[kind]
    save(tmp_path / "hf", make(), rows)
    if "tokenizer.model" in make():
        expected = SentencePieceProcessor(model_proto=make()["tokenizer.model"]).encode(TEXTS)
    else:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
        expected = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    found = ask(tmp_path / "hf", tmp_path / "model.gguf", texts=TEXTS)["texts"]
    wrong = [text for text, ours, theirs in zip(TEXTS, found, expected, strict=True) if ours != theirs]
    # Qwen's tokenizer puts texts into Unicode's form C first, which llama.cpp does for no BPE.
    assert [text for text in wrong if kind != "Qwen 2" or unicodedata.is_normalized("NFC", text)] == []
