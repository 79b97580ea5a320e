"""Help as somebody reads it who meets the program today: in groups, in sentences, in the same words everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc

import click
import pytest
from command_lines import command_of, line_of

from weightops.cli.main import COMMANDS, GROUPS, LINES, SUBCOMMANDS, run
from weightops.recipes.verbs import VERBS

WRITERS = {*map(line_of, VERBS), "quantize", "imatrix", "download", "manifest", "sign"}
ADAPTERS = ("adapter combine", "adapter rank")
OWN_WORDS = {
    "--out": {"download", "manifest", "sign", "generate", "imatrix"},
    "--key": {"sign"},
    "--certificate": {"sign"},
    "--workers": {"download"},
    "--overwrite": {"download"},
    "--dry-run": {"download", "serve", "publish"},
    "--manifest": set(),
    "--dtype": {"recover", "convert", "diff", "extract-lora", "cast", "dequantize", "merge", *ADAPTERS},
    "--rank": {"extract-lora", *ADAPTERS},
    "--drop": {"recover", "shard", "part"},
    "--method": {"diff", "quantize", "merge", "adapter combine", "vocab"},
    "--base": {"merge-lora", "extract-lora", "inspect", "merge", "adapter convert"},
    "--tokenizer": {"convert", "vocab"},
    "--init": {"part", "vocab"},
    "--by": {"adapter rank", "experts"},
    "--chat-template": {"merge", "vocab"},
    "--include": {"download", "inspect"},
    "--tuned": {"diff", "extract-lora"},
    "--strict": {"compare"},
    "--text": {"compare"},
    "--prompts": {"compare"},
    "--seq-len": {"quantize", "eval", "imatrix"},
    "--max-memory": {"quantize"},
    "--checkpoint-format": {"dequantize", "repack"},
    "--zero-overflow": {"repack"},
    "--to": {"repack", "adapter convert"},
    "--html": {"check", "quantize", "merge"},
    "--weight": {"merge-lora", "merge"},
    "--set": {"convert", "edit"},
    "--density": {"adapter combine"},
    "--weights": {"adapter combine"},
    "--alpha": {"adapter convert"},
    "--keep": {"adapter rank", "experts"},
}
"""Options whose words differ from those of the same name elsewhere, by the commands that have words of their own."""
AMERICAN = re.compile(r"\b(quantiz(ed|ing|ation)|colors?|licenses?|normaliz\w+|optimiz\w+|behaviors?)\b", re.IGNORECASE)
STARTS = re.compile(r"[A-Z]|--\w|gptq|\* is")


def options_of(name: str) -> Iterator[click.Option]:
    yield from (p for p in command_of(name).params if isinstance(p, click.Option))


def test_every_command_is_one_line_of_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for title, commands in GROUPS.items():
        first = lines.index(f"{title}:") + 1
        assert [line.split(maxsplit=1) for line in lines[first : first + len(commands)]] == [
            [name, line] for name, line in commands.items()
        ]
    assert len(COMMANDS) == sum(map(len, GROUPS.values()))
    assert all(line[0].isupper() and line.endswith(".") for line in COMMANDS.values())


@pytest.mark.parametrize("name", [*LINES, *SUBCOMMANDS])
def test_help_is_whole_sentences_in_british_spelling(name: str) -> None:
    texts = {option.opts[-1]: option.help or "" for option in options_of(name)}
    paragraphs = cleandoc(command_of(name).help or "").split("\n\n")
    texts |= {f"paragraph {i}": p for i, p in enumerate(paragraphs) if not p.startswith("\b")}
    assert {where: text for where, text in texts.items() if not text.endswith((".", ":"))} == {}
    assert {where: text for where, text in texts.items() if not STARTS.match(text)} == {}
    assert {where: text for where, text in texts.items() if AMERICAN.search(text)} == {}
    first, example = paragraphs[0], next(i for i, p in enumerate(paragraphs) if "Example:" in p)
    assert len(first) <= 100
    assert example <= 2, "the example comes before the details"


def test_options_of_one_name_are_described_in_the_same_words() -> None:
    words: dict[str, dict[str, set[str]]] = {}
    for name in LINES:
        for option in options_of(name):
            flag = option.opts[-1]
            if name not in OWN_WORDS.get(flag, set()):
                words.setdefault(flag, {}).setdefault(option.help or "", set()).add(name)
    assert {flag: found for flag, found in words.items() if len(found) > 1} == {}
    known = {(flag, name) for flag, names in OWN_WORDS.items() for name in names}
    assert known <= {(option.opts[-1], name) for name in LINES for option in options_of(name)}


@pytest.mark.parametrize("name", LINES)
def test_what_writes_can_be_tried_and_says_where(name: str) -> None:
    flags = {flag for option in options_of(name) for flag in option.opts}
    assert ({"-n", "--dry-run"} <= flags) == (name in {*WRITERS, "run", "serve", "publish"})
    assert ({"-o", "--out"} <= flags) == (name in {*WRITERS, "generate"})
    assert ("--json" in flags) == (name not in ("completion", "browse", "chat", "serve"))


def test_options_are_shown_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cast", "--help"]) == 0
    shown = capsys.readouterr().out
    titles = [shown.index(title) for title in ("\nOptions:", "\nFiles of the result:", "\nHow to run:")]
    assert titles == sorted(titles)
    assert shown.index("--dtype") < titles[1] < shown.index("--format") < titles[2] < shown.index("--dry-run")
    assert shown.index("--help") > titles[2]
