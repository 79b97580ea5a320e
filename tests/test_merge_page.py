"""The page about merging, as it stands: its commands, its files and its Python, on small models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters import save_adapter
from hub import Hub
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightops.cli.main import run
from weightops.ops.merging.method import Method, Parameter
from weightops.ops.merging.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs/merge.md"
NEW = ("<|im_start|>", "<|im_end|>")


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^    weightops (.*)", PAGE.read_text(), re.MULTILINE)]


def blocks(language: str) -> dict[str, str]:
    """The page's blocks, by the file names in their first lines; of those without one by their numbers."""
    found = re.findall(rf"```{language}\n(?:# (\S+)\n)?(.*?)```", PAGE.read_text(), re.DOTALL)
    return {name or str(i): text for i, (name, text) in enumerate(found)}


def tuned(base: Path, folder: Path, seed: int) -> None:
    """A copy of a model, with some of everything changed."""
    shutil.copytree(base, folder)
    state = load_file(base / "model.safetensors")
    random = torch.Generator().manual_seed(seed)
    state = {name: t + torch.randn(t.shape, generator=random) * 0.05 for name, t in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def with_tokens(base: Path, folder: Path) -> None:
    """A model with two tokens of its own."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(NEW)})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Path]:
    """A working directory with the page's models and files, and a hub with one of them."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base", "llama", num_hidden_layers=4)
    for seed, name in enumerate(("chat", "code")):
        tuned(tmp_path / "base", tmp_path / name, seed)
    with_tokens(tmp_path / "base", tmp_path / "talker")
    save_adapter(tmp_path / "lora", tmp_path / "base")
    for name, text in {**blocks("yaml"), **blocks("python")}.items():
        if not name.isdigit():
            (tmp_path / name).write_text(text)
    with Hub() as hub:
        hub.add("org/chat", {path.name: path.read_bytes() for path in (tmp_path / "chat").iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield tmp_path
    for name in [name for name, method in METHODS.items() if method.plugin]:
        del METHODS[name]


def test_the_page_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for arguments in commands():
        assert run(arguments) == 0, arguments
        shown.append(capsys.readouterr().out)
    assert {arguments[0] for arguments in commands()} == {"merge", "generate", "compare", "run"}
    written = [arguments[arguments.index("--out") + 1] for arguments in commands() if "--out" in arguments]
    for folder in [*written, "mixed", "mixed-bf16", "arc"]:
        model = AutoModelForCausalLM.from_pretrained(here / folder)
        assert all(parameter.isfinite().all() for parameter in model.parameters()), folder
    assert sum(text.startswith("tensor ") for text in shown) == 2
    assert shown[[*commands()].index(["merge", "./arc.yml", "--verify", "./arced"])].startswith("arced: is what")
    assert (here / "arced.html").stat().st_size > 5000
    assert "- mergekit\n" in (here / "arced/README.md").read_text()
    assert json.loads((here / "deep/config.json").read_text())["num_hidden_layers"] == 6
    for folder, rows in (("joined", None), ("talking", 64)):
        tokenizer = AutoTokenizer.from_pretrained(here / folder)
        embedding = load_file(here / folder / "model.safetensors")["model.embed_tokens.weight"]
        assert {*NEW} <= tokenizer.get_vocab().keys()
        assert len(embedding) == -(-len(tokenizer) // (rows or 1)) * (rows or 1)
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    parted, code = (load_file(here / name / "model.safetensors") for name in ("parted", "code"))
    assert torch.equal(parted["lm_head.weight"], code["lm_head.weight"])
    assert not torch.equal(parted["model.norm.weight"], code["model.norm.weight"])
    arc, arced = (load_file(here / name / "model.safetensors") for name in ("arc", "arced"))
    assert all(torch.equal(arc[name], arced[name]) for name in arc)


def test_its_python_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "./arc.yml", "--out", "./arced"]) == 0
    (block,) = (text for name, text in blocks("python").items() if name.isdigit())
    capsys.readouterr()
    exec(block, {})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("slerp {'t': 0.")
    assert said[0].endswith("['chat', 'code']")
    assert said[1] == "True"
    assert len(said) == 4


def shown(name: str, parameter: Parameter) -> str:
    value = parameter.default
    if value is None:
        return f"`{name}` none" if parameter.is_optional else f"`{name}`"
    return f"`{name}` {str(value).lower() if isinstance(value, bool) else f'{value:g}'}"


def source(method: Method) -> str:
    paper = method.source.removeprefix("arXiv ")
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper != method.source else paper


def test_the_table_has_every_method_with_its_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    ours = {name: method for name, method in METHODS.items() if not method.plugin}
    assert [name for name, *_ in rows] == [*ours]
    for name, base, parameters, paper in rows:
        method = ours[name]
        assert parameters == (", ".join(shown(*each) for each in method.parameters.items()) or "none"), name
        assert paper == source(method), name
        assert base == {"needed": "one of the two" if name == "slerp" else "needed", "input": "none"}.get(
            method.base, method.base
        ), name
