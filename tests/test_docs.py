"""The documents say what is true."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from support import write_checkpoint

from weightops.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
SVG = ROOT / "docs/terminal.svg"


def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("llama-13b", "zhixi-diff", "my-model", "model")):
        torch.manual_seed(seed)
        write_checkpoint(tmp_path / name, {"model.norm.weight": torch.randn(8).half()})
    namespace: dict[str, object] = {"progress": None}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block.replace('save(tuned, "./my-model"', 'save(tuned, "./my-model-again"'), namespace)
    assert len(blocks) == 5
    assert (tmp_path / "zhixi" / "pytorch_model.bin").exists()
    assert (tmp_path / "my-model-again" / "model.safetensors").exists()


def test_every_command_has_a_python_twin() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    assert all(f"`{command}" in page for command in COMMANDS.keys() - {"env", "completion", "browse", "serve"})


def load(script: str) -> ModuleType:
    """A program in docs/."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MARKDOWN = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "manifests/*.md", "benchmarks/**/*.md", "kernels/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$|^    [^\n]*$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What a page's headings are called in links, by GitHub's rules and by mkdocs', where these agree."""
    titles = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ (.*)", prose(path), re.MULTILINE)]
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {title.replace(" ", "-") for title in plain} & {re.sub(r"[\s-]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", MARKDOWN)
def test_links_lead_somewhere(page: str) -> None:
    path, broken = ROOT / page, []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        # A folder is a page on GitHub, and none of the site.
        if "://" not in target and (not there.is_file() or (anchor and anchor not in anchors(there))):
            broken.append(target)
    assert broken == []


def test_design_names_modules_that_exist() -> None:
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", (ROOT / "docs/design.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not any((ROOT / top / name).exists() for top in ("weightops", "."))] == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    hooks, nav = load("hooks"), yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [name for entries in hooks.sections(nav).values() for _, name in entries]
    assert sorted(listed) == sorted(hooks.pages())
    assert {"index.md", "changelog.md", "commands.md"} <= set(listed)


def test_texts_for_assistants_hold_every_page() -> None:
    hooks, nav = load("hooks"), yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    texts = hooks.pages()
    index, everything = hooks.index(nav, texts), hooks.everything(nav, texts)
    assert index.startswith("# weightops\n\n> A command-line tool for the weights of large language models: fetch")
    for name, text in texts.items():
        assert re.search(rf"^- \[[^]]+\]\({name}\): \S.{{20,}}[.:;?]?$", index, re.MULTILINE), name
        assert text.strip() in everything, name


def test_links_of_pages_that_lie_elsewhere_lead_to_pages_of_the_site() -> None:
    hooks = load("hooks")
    text = "[a](docs/convert.md#x) [b](LICENSE) ![c](docs/memory.svg) [d](https://e.org/f) [g](#h) [i](CHANGELOG.md)"
    license_file = "https://github.com/weightops/weightops/blob/main/LICENSE"
    moved = f"[a](convert.md#x) [b]({license_file}) ![c](memory.svg) [d](https://e.org/f) [g](#h) [i](changelog.md)"
    assert hooks.moved(text, "README.md") == moved
    below = hooks.moved("[a](../README.md) [b](convert.md) [c](../tests/killing.py)", "docs/testing.md")
    killing = "https://github.com/weightops/weightops/blob/main/tests/killing.py"
    assert below == f"[a](index.md) [b](convert.md) [c]({killing})"


@pytest.mark.skipif(shutil.which("bash") is None, reason="the picture is of a Unix shell")
def test_the_picture_of_a_terminal_shows_what_the_commands_say() -> None:
    pictures = load("pictures")
    drawn, kept = (
        re.sub(r"in \d+\.\d s", "in 0.0 s", text) for text in (pictures.draw(pictures.session()), SVG.read_text())
    )
    assert drawn == kept, "run `python docs/pictures.py`"
    assert "exit code 3" in kept


def test_pictures_load_fast() -> None:
    sizes = {path.name: path.stat().st_size for path in (SVG, ROOT / "docs/report.png", ROOT / "docs/memory.svg")}
    assert {name for name, size in sizes.items() if not 1000 < size < 150_000} == set()
