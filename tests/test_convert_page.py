"""The page about converting: its two walk-throughs, run as they stand on small models."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from gguf_adapters import save_lora
from gguf_models import save_family
from hub import Hub
from meta_model import meta_download

import weightops
from weightops.cli.main import run
from weightops.formats.gguf import read_gguf
from weightops.formats.proofs import published as manifests
from weightops.io.source_file import SourceFile
from weightops.stores.reader import FileReader

PAGE = Path(__file__).parents[1] / "docs/convert.md"
GOLDEN = Path(__file__).parent / "golden/knowlm"


def commands(heading: str) -> list[list[str]]:
    """The commands under a heading, as arguments."""
    section = PAGE.read_text().partition(f"## {heading}")[2].partition("\n## ")[0]
    found = re.findall(r"^    weightops ((?:.*\\\n)*.*)", section, re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


def test_from_a_download_of_meta_to_llama_cpp_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    meta_download(tmp_path / "llama-2-7b")
    found = commands("From Meta's download")
    assert [arguments[3] for arguments in found] == ["hf", "hf", "gguf", "meta"]
    for arguments in found:
        assert run(arguments) == 0, arguments
    assert sorted(path.name for path in (tmp_path / "llama-2-7b-mp4").glob("*.pth"))[-1] == "consolidated.03.pth"
    with FileReader() as files:
        header = read_gguf(SourceFile.at(tmp_path / "llama-2-7b-gguf/model.gguf"), files)
    assert header.metadata["llama.context_length"] == {"uint32": 4096}


def test_adapters_to_gguf_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_family(tmp_path / "qwen3-8b", "qwen3")
    save_lora(tmp_path / "my-lora", tmp_path / "qwen3-8b")
    for arguments in commands("LoRA adapters in GGUF"):
        assert run(arguments) == 0, arguments
    before, after = (tmp_path / name / "adapter_model.safetensors" for name in ("my-lora", "my-lora-again"))
    assert before.read_bytes() == after.read_bytes()


def test_knowlm_from_metas_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lists, repository = tmp_path / "lists", "zjunlp/knowlm-13b-diff"
    lists.mkdir()
    shutil.copy(GOLDEN / "recovered.md5", lists / "zhixi-13b-base.md5")
    diff = {path.name: path.read_bytes() for path in (GOLDEN / "diff").iterdir()}
    sums = [f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in diff.items() if name.endswith(".bin")]
    (lists / "zhixi-13b-diff.md5").write_text("".join(sums))
    (lists / "sources.json").write_text(json.dumps({"zhixi-13b-diff": {"repository": repository}}))
    monkeypatch.setattr(manifests, "_folder", lambda: lists)
    weightops.convert(GOLDEN / "raw", "llama-13b-meta", to="meta", model_parallel=2)
    with Hub() as hub:
        hub.add(repository, diff)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for arguments in commands("KnowLM from Meta's weights"):
            assert run([word.replace("10GB", "150KB") for word in arguments]) == 0, arguments
