"""The pages about surgery, as they stand: their commands and files, on small models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from families import COMMON, FAMILIES
from mtp_models import save_with_mtp
from safetensors.torch import save_file
from tiny_models import save_tiny, tiny
from tiny_models import text as heldout
from transformers import AutoModelForCausalLM
from vision_models import save_whole

from weightops.cli.main import run

DOCS = Path(__file__).parents[1] / "docs"


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^    weightops (.*)", (DOCS / page).read_text(), re.MULTILINE)]


def write_files(page: str, folder: Path) -> None:
    """The page's blocks of YAML that begin with a file's name."""
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        (folder / name).write_text(text)


def saved(kind: str, folder: Path, **changes: object) -> None:
    tiny(kind, **{**COMMON, **FAMILIES.get(kind, {}), **changes}).save_pretrained(folder)


def logits(folder: str) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.tensor([[3, 5, 9, 17]])).logits  # type: ignore[no-any-return]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parts(here: Path) -> None:
    save_whole("gemma3", here / "gemma-3-4b")
    save_with_mtp(here / "original")
    (here / "tuned").symlink_to(here / "original")
    save_tiny(here / "chat", "llama")
    for arguments in commands("parts.md"):
        assert run(arguments) == 0, arguments


def test_experts(here: Path) -> None:
    save_tiny(here / "moe", "qwen3_moe", **{**COMMON, **FAMILIES["qwen3_moe"]})
    (here / "heldout.txt").write_text(heldout(50))
    for seed, name in enumerate(("chat", "code")):
        save_tiny(here / name, "llama", seed)
    write_files("experts.md", here)
    keep = re.search(r"```json\n(.*?)```", (DOCS / "experts.md").read_text(), re.DOTALL)
    assert keep is not None
    (here / "keep.json").write_text(keep[1])
    for arguments in commands("experts.md"):
        assert run(arguments) == 0, arguments
    assert torch.equal(logits("moe-apart"), logits("moe"))
    kept = [json.loads((here / f"moe-{name}" / "config.json").read_text()) for name in ("best", "frequent")]
    assert {config.get("num_experts", config.get("num_local_experts")) for config in kept} == {3}
    assert type(AutoModelForCausalLM.from_pretrained("mixture")).__name__ == "MixtralForCausalLM"


def test_edit(here: Path) -> None:
    save_tiny(here / "model", "llama", **{**COMMON, "tie_word_embeddings": False})
    (here / "heldout.txt").write_text(heldout(50))
    saved("llama", here / "many-heads", num_key_value_heads=4)
    saved("phi3", here / "phi-3")
    save_file(
        {"direction": torch.randn(64, generator=torch.Generator().manual_seed(1))}, here / "direction.safetensors"
    )
    write_files("edit.md", here)
    for arguments in commands("edit.md"):
        assert run(arguments) == 0, arguments
    assert torch.equal(logits("as-llama"), logits("phi-3"))
    assert torch.equal(logits("phi-as-llama"), logits("phi-3"))
    assert torch.equal(logits("deeper"), logits("model"))
    torch.testing.assert_close(logits("folded"), logits("model"), rtol=1e-4, atol=1e-4)
    for folder in ("long", "pooled", "narrow", "without", "shallower"):
        logits(folder)
