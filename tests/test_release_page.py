"""The page about releasing a model: its recipe and its commands, run as they stand on small models."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from adapters import llama, save_adapter, save_model
from safetensors.torch import load_file
from support import write_checkpoint
from transformers import LlamaForCausalLM

import weightops
from weightops.cli.main import run
from weightops.formats.proofs import published as manifests

PAGE = Path(__file__).parents[1] / "docs/release.md"


def commands() -> list[list[str]]:
    found = re.findall(r"^    weightops ((?:.*\\\n)*.*)", PAGE.read_text(), re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "llama-13b", llama(num_hidden_layers=3), torch.float16)
    save_adapter(tmp_path / "lora", tmp_path / "llama-13b")
    config = json.loads((tmp_path / "llama-13b/config.json").read_text())
    raw = load_file(tmp_path / "llama-13b/model.safetensors")
    diff = {name: (torch.randn(t.shape) * 0.01).half() for name, t in raw.items()}
    write_checkpoint(tmp_path / "zhixi-diff", diff, config)
    (tmp_path / "release.yaml").write_text(re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])
    lists = tmp_path / "lists"
    lists.mkdir()
    weightops.recover("llama-13b", "zhixi-diff", "expected", format="torch-1.12", max_shard_size="10GB")
    files = [path for path in (tmp_path / "expected").iterdir() if path.suffix == ".bin"]
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (lists / "zhixi-13b-base.md5").write_text("".join(sums))
    monkeypatch.setattr(manifests, "_folder", lambda: lists)
    found = commands()
    assert [arguments[0] for arguments in found] == [
        *("run", "run", "inspect", "check", "merge-lora", "extract-lora", "cast", "cast", "shard", "shard"),
    ]
    for arguments in found:
        assert run(arguments) == 0, arguments
    merged = json.loads((tmp_path / "merged/weightops-manifest.json").read_bytes())
    chat = json.loads((tmp_path / "zhixi-chat-f16/weightops-manifest.json").read_bytes())
    assert merged["content_id"] == chat["content_id"]
    assert "base_model: llama-13b is no repository" in (tmp_path / "zhixi-chat/README.md").read_text()
    short = LlamaForCausalLM.from_pretrained(tmp_path / "merged-short")
    assert short.config.num_hidden_layers == 2
