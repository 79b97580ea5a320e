"""Manual pages, from the commands' own help: docs/man/*.1, which the wheel brings to share/man/man1.

`python docs/generate.py` writes them; a test holds them to the commands. See man(7) for the language.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import cleandoc
from pathlib import Path

import click

from weightops.cli.main import COMMANDS, ENVIRONMENT, EXIT_CODES, GROUPS, LINES, PROGRAM, SUBCOMMANDS, cli
from weightops.cli.params import Command

FOLDER = Path(__file__).with_name("man")


def render() -> dict[Path, str]:
    """All pages."""
    pages = {PROGRAM: _main_page()} | {page_of(line): _page(line) for line in [*SUBCOMMANDS, *LINES]}
    return {FOLDER / f"{name}.1": text for name, text in pages.items()}


def page_of(line: str) -> str:
    """The page of a command, by the words that run it."""
    return "-".join([PROGRAM, *line.split()])


def _main_page() -> str:
    context = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    first, *rest = _paragraphs(cli.help or "")
    parts = _head(PROGRAM, first.rstrip("."), f"{PROGRAM} COMMAND [OPTIONS] ...")
    parts += [".SH DESCRIPTION", *_text([part for part in rest if not part.startswith("`")])]
    parts.append(".SH COMMANDS")
    for title, commands in GROUPS.items():
        parts.append(f".SS {_escaped(title)}")
        parts += _entries({f"{PROGRAM}-{name}(1)": line for name, line in commands.items()}.items())
    records = [param.get_help_record(context) for param in cli.get_params(context)]
    parts += [".SH OPTIONS", *_entries(record for record in records if record is not None)]
    parts += [".SH ENVIRONMENT", *_entries(ENVIRONMENT.items())]
    parts += [".SH EXIT STATUS", *_entries((str(code), text) for code, text in EXIT_CODES.items())]
    parts += _see_also(f"{PROGRAM}-{name}" for name in COMMANDS)
    return "\n".join(parts) + "\n"


def _page(line: str) -> str:
    command: click.Command = cli
    context = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    for name in line.split():
        found = command.get_command(context, name) if isinstance(command, click.Group) else None
        assert found is not None
        command, context = found, click.Context(found, info_name=name, parent=context, **found.context_settings)
    usage = " ".join([PROGRAM, line, *command.collect_usage_pieces(context)])
    first, *rest = _paragraphs(command.help or "")
    parts = _head(page_of(line), first.rstrip("."), usage)
    parts += [".SH DESCRIPTION", *_text([part for part in rest if not _is_example(part)])]
    parts += [".SH EXAMPLES", *_text(_lines(part) for part in rest if _is_example(part))]
    if isinstance(command, Command):
        for title, rows in command.sections(context).items():
            parts += [f".SH {_escaped(title.upper())}", *_entries(rows)]
    else:
        own = {name: command.get_command(context, name) for name in SUBCOMMANDS[line]}
        said = ((f"{page_of(line)}-{name}(1)", each.short_help or "") for name, each in own.items())
        parts += [".SH COMMANDS", *_entries(said)]
    codes = (command.epilog or "").removeprefix("Exit codes: ").rstrip(".").split("; ")
    parts += [".SH EXIT STATUS", *_entries(_codes(codes))]
    parts += _see_also([PROGRAM])
    return "\n".join(parts) + "\n"


def _codes(said: Iterable[str]) -> list[tuple[str, str]]:
    """Exit codes and their meanings, of which some have semicolons themselves."""
    found: list[tuple[str, str]] = []
    for part in said:
        code, _, text = part.partition(" ")
        if code.isdigit():
            found.append((code, text))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}; {part}")
    return found


def _paragraphs(text: str) -> list[str]:
    return cleandoc(text).split("\n\n")


def _is_example(paragraph: str) -> bool:
    return paragraph.startswith("\b\nExample:")


def _lines(example: str) -> str:
    """An example without its title."""
    return "\b\n" + "\n".join(example.split("\n")[2:])


def _head(name: str, line: str, usage: str) -> list[str]:
    return [
        f'.TH {name.upper()} 1 "" "{PROGRAM}" "{PROGRAM}"',
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{_escaped(name)} \\- {_escaped(line[0].lower() + line[1:])}",
        ".SH SYNOPSIS",
        f"\\fB{_escaped(usage)}\\fR",
    ]


def _text(paragraphs: Iterable[str]) -> list[str]:
    """Paragraphs; those that begin with a backspace stay in their lines."""
    parts = []
    for paragraph in paragraphs:
        if paragraph.startswith("\b\n"):
            parts += [".PP", ".nf", *map(_escaped, paragraph.split("\n")[1:]), ".fi"]
        else:
            parts += [".PP", *map(_escaped, paragraph.split("\n"))]
    return parts


def _entries(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [
        line for term, text in rows for line in (".TP", f"\\fB{_escaped(term)}\\fR", _escaped(" ".join(text.split())))
    ]


def _see_also(names: Iterable[str]) -> list[str]:
    return [".SH SEE ALSO", ", ".join(f"\\fB{_escaped(name)}\\fR(1)" for name in names)]


_CHARACTERS: Mapping[int, str] = str.maketrans(
    {"\\": "\\e", "-": "\\-", "`": "\\(ga", "'": "\\(aq", "^": "\\(ha", "~": "\\(ti"}
)
"""What would be read as something else, or printed as another character."""


def _escaped(text: str) -> str:
    found = text.translate(_CHARACTERS)
    return f"\\&{found}" if found.startswith((".", "\\(aq")) else found
