"""The page about vocabularies, as it stands: its commands, its recipe and its Python, on small models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_tokenizers import training_text
from tiny_models import save_tiny
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from weightops.cli.main import run

PAGE = Path(__file__).parents[1] / "docs/vocab.md"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^    weightops (.*)", PAGE.read_text(), re.MULTILINE)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's models, of which the large one has words of its own, and its files."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "small", "llama", num_hidden_layers=1)
    save_tiny(tmp_path / "large", "qwen2", seed=1, vocab_size=400, num_hidden_layers=1)
    tokenizer = Tokenizer.from_file(str(tmp_path / "large/tokenizer.json"))
    tokenizer.add_tokens(["weightier", "streamed"])
    tokenizer.add_special_tokens(["<|user|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "large")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    (tmp_path / "corpus.txt").write_text("\n".join(training_text()[:9]))
    (tmp_path / "chat.yml").write_text(re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])
    return tmp_path


def test_the_page_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands():
        assert run(arguments) == 0, arguments
    captured = capsys.readouterr()
    said = captured.err + captured.out
    assert {arguments[0] for arguments in commands()} == {"vocab", "run"}
    rows = {"small-1024": 1024, "small-64": 320, "small-chat": 322, "draft": 512, "small-omp": 323, "draft-chat": 324}
    for name, count in rows.items():
        model, report = AutoModelForCausalLM.from_pretrained(here / name, output_loading_info=True)
        assert not any(report.values()), name
        assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == count, name
    assert not (here / "small-chat2").exists()
    assert "rows become 321: 321 as they were" in said
    tokenizer = AutoTokenizer.from_pretrained(here / "small-chat")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert tokenizer.eos_token in chat
    ends = json.loads((here / "small-chat/generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.eos_token_id, 1]
    small, trimmed = (load_file(here / name / "model.safetensors") for name in ("small", "small-trimmed"))
    assert len(trimmed["lm_head.weight"]) < 320
    layers = [name for name in small if "layers" in name]
    assert all(torch.equal(small[name], trimmed[name]) for name in layers)


def test_its_python_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(block, {})
    said = capsys.readouterr().out
    assert said.endswith("320 rows become 336: 320 as they were, 1 made of several, 15 the mean of the old\n")
