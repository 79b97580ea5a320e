"""British spelling in what people read: pages, help and messages. Code and names that others gave stay as they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest
from command_lines import command_of

import weightops
from weightops.cli.main import COMMANDS, ENVIRONMENT, EXIT_CODES, LINES, SUBCOMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
AMERICAN = re.compile(
    r"\b\w+iz(?:e|es|ed|ing|er|ers|able|ation|ations)\b|\b\w*lyz(?:e|es|ed|ing)\b"
    r"|\b(?:colors?|colored|behaviors?|centers?|centered|licenses?|favors?|favorite|neighbors?|neighboring|honors?|gray"
    r"|catalogs?|dialogs?|labeled|modeling|canceled|canceling|traveled|fulfill|defense|judgment|artifacts?)\b",
    re.IGNORECASE,
)
TERMS = re.compile(r"(?:re)?siz(?:e|es|ed|ing|able)|tokenizers?|(?:de)?quantized?", re.IGNORECASE)
"""Words that are spelt so everywhere, the field's own, and names of commands and of choices."""
CODE = re.compile(
    r"```.*?```|<!--.*?-->|weightops [\w-]+|Apache License|^ {4}.*?$|`[^`]*`|\]\([^)]*\)|--[\w-]+|\w+[./_]\w[\w./]*",
    re.DOTALL | re.MULTILINE,
)


def american(text: str) -> list[str]:
    """The words of a text that a Briton would spell otherwise."""
    return [word for word in AMERICAN.findall(CODE.sub(" ", text)) if not TERMS.fullmatch(word)]


def test_it_finds_what_it_looks_for() -> None:
    text = "Realized colors of a tokenizer's size; `normalize`, --colors\n\n    code to optimize\n\nis serializable"
    assert american(text) == ["Realized", "colors", "serializable"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: Path) -> None:
    assert american(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", [*LINES, *SUBCOMMANDS])
def test_help(name: str) -> None:
    command = command_of(name)
    texts = [(command.help or "").partition("\b\n")[0], COMMANDS.get(name, command.short_help) or ""]
    texts += [option.help or "" for option in command.params if isinstance(option, click.Option)]
    assert len(texts) >= 2
    assert [word for text in texts for word in american(" ".join(text.split()))] == []


def test_tables_of_the_command_line() -> None:
    assert [word for text in (*EXIT_CODES.values(), *ENVIRONMENT.values()) for word in american(text)] == []


def test_messages() -> None:
    found = []
    for path in Path(weightops.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        # Docstrings are statements: they cite titles and other people's names.
        documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                is_style = "{" in node.value
                words = american(node.value) if " " in node.value and not is_style else []
                found += [f"{path.name}: {word} in {node.value!r}" for word in words]
    assert found == []
