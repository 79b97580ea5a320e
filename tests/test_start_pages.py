"""The pages to start at, as they stand: their commands and their Python, on small models."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from adapters import save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_tokenizer, text
from writable_hub import WritableHub

import weightops
from weightops.cli.main import run
from weightops.inference.templates.template import named_templates
from weightops.io.source_file import SourceFile

DOCS = Path(__file__).parents[1] / "docs"


def commands(page: str) -> list[list[str]]:
    """The lines of weightops, as arguments without what a shell takes from them."""
    found = re.findall(r"^    (?:if )?weightops (.*)", (DOCS / page).read_text(), re.MULTILINE)
    return [shlex.split(re.split(r";|>", line)[0]) for line in found]


def python(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A working directory with a small base, an adapter for it, and texts."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base", "llama", hidden_size=128, intermediate_size=256)
    for name in ("text.txt", "heldout.txt"):
        (tmp_path / name).write_text(text(200))
    return tmp_path


def test_a_release_is_made_and_proven(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(here / "lora", here / "base")
    shutil.move(here / "base", here / "published")
    found = commands("release-engineer.md")
    verbs = ("download", "merge-lora", "check", "verify", "merge-lora", "publish", "publish", "verify", "verify")
    assert [arguments[0] for arguments in found] == [*verbs]
    with WritableHub(token="hf_abc") as hub:
        hub.add("org/base-model", {path.name: path.read_bytes() for path in (here / "published").iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_abc")
        for arguments in found:
            assert run(arguments) == 0, arguments
        assert hub.files("org/release")["README.md"] == (here / "release/README.md").read_bytes()
    assert (here / "report.xml").exists()
    assert "base_model" in (here / "release/README.md").read_text()
    assert b'"sha256"' in (here / "release/weightops-manifest.json").read_bytes()
    assert (here / "again/weightops-manifest.json").exists()


def test_an_adapter_becomes_a_model_on_a_laptop(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(here / "lora", here / "base")
    found = commands("laptop.md")
    verbs = ("merge-lora", "check", "generate", "quantize", "eval", "generate", "convert")
    assert [arguments[0] for arguments in found] == [*verbs]
    for arguments in found:
        assert run(arguments) == 0, arguments
    assert "merged-4bit" in capsys.readouterr().out
    assert SourceFile.at(here / "merged.gguf").nbytes > 0
    assert run(["verify", "./merged-4bit"]) == 0


def test_the_page_for_notebooks_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(here / "base", here / "tuned")
    tensors = load_file(here / "base/model.safetensors")
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name] += torch.randn_like(tensors[name]) * 0.01
    save_file(tensors, here / "tuned/model.safetensors", {"format": "pt"})
    namespace: dict[str, object] = {}
    for block in python("researcher.md"):
        exec(block, namespace)
    assert namespace["widest"] in tensors
    assert "is changed in more directions than 8" in capsys.readouterr().out
    assert weightops.inspect("./tuned-bf16").by_dtype().keys() == {"bfloat16"}


def test_a_recovered_model_runs_without_being_written(here: Path) -> None:
    shutil.copytree(here / "base", here / "llama-13b")
    shutil.copytree(here / "base", here / "zhixi")
    weightops.diff("./base", "./zhixi", "./zhixi-diff")
    (block,) = python("inference.md")
    namespace: dict[str, object] = {}
    exec(block, namespace)
    assert "model.norm.weight" in namespace["tuned"]  # type: ignore[operator]


def test_the_page_about_talking_runs(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(here / "base", "llama", max_position_embeddings=4096)
    save_adapter(here / "lora", here / "base")
    shutil.copytree(here / "base", here / "model")
    save_tokenizer(here / "model", chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    (here / "prompts.txt").write_text("Once upon a time\nWhy?\n")
    found = commands("chat.md")
    piped = re.findall(r"^    printf .* \| weightops (.*)", (DOCS / "chat.md").read_text(), re.MULTILINE)
    found += [shlex.split(line) for line in piped]
    assert [arguments[0] for arguments in found] == [*["chat"] * 3, *["generate"] * 3, "chat"]
    for arguments in found:
        monkeypatch.setattr("sys.stdin", io.StringIO("Why is the sky blue?\nAnd at night?\n"))
        assert run(arguments) == 0, arguments
    namespace: dict[str, object] = {}
    for block in python("chat.md"):
        exec(block, namespace)
    assert "('tuned', True)" in capsys.readouterr().out
    for line in re.findall(r"^    (\{.*\})$", (DOCS / "chat.md").read_text(), re.MULTILINE):
        (here / "line.jsonl").write_text(line)
        assert run(["generate", "./model", "--prompts", "line.jsonl", "--out", f"{hash(line)}.jsonl"]) == 0
    listed = re.findall(r"^\| (`[^|]*) \|", (DOCS / "chat.md").read_text().partition("## Templates")[2], re.MULTILINE)
    names = {name for cell in listed for name in re.findall(r"`([a-z0-9]+)`", cell)}
    assert names >= named_templates().keys()
