"""The documents say what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import write_checkpoint

from weightops.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent


def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("llama-13b", "zhixi-diff", "my-model", "model")):
        torch.manual_seed(seed)
        write_checkpoint(tmp_path / name, {"model.norm.weight": torch.randn(8).half()})
    namespace: dict[str, object] = {"progress": None}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block.replace('save(tuned, "./my-model"', 'save(tuned, "./my-model-again"'), namespace)
    assert len(blocks) == 4
    assert (tmp_path / "zhixi" / "pytorch_model.bin").exists()
    assert (tmp_path / "my-model-again" / "model.safetensors").exists()


def test_every_command_has_a_python_twin() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    assert all(f"`{command}" in page for command in COMMANDS.keys() - {"env", "completion"})


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    assert [t for t in targets if "://" not in t and not (path.parent / t).exists()] == []
