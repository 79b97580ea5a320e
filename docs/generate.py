"""Write what of the documents is made from the code: `python docs/generate.py`. Tests hold the two together.

That is docs/commands.md, from the commands' own help, and docs/schemas/, from the types of what they print and write.
"""

from __future__ import annotations

from pathlib import Path

import click

from weightops import errors
from weightops.cli.main import COMMANDS, ENVIRONMENT, EXIT_CODES, cli

TARGET = Path(__file__).with_name("commands.md")


def help_text(*path: str) -> str:
    """What `weightops PATH --help` prints, 100 columns wide."""
    command: click.Command = cli
    context = click.Context(cli, info_name="weightops", **cli.context_settings, terminal_width=100)
    for name in path:
        found = command.get_command(context, name) if isinstance(command, click.Group) else None
        assert found is not None
        command = found
        context = click.Context(command, info_name=name, parent=context, terminal_width=100)
    return command.get_help(context)


def exit_code_table() -> list[str]:
    """Exit codes with the errors that carry them."""
    names: dict[int, list[str]] = {}
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.WeightopsError):
            names.setdefault(error.exit_code, []).append(f"`{name}`")
    rows = [f"| {code} | {text} | {', '.join(sorted(names.get(code, [])))} |" for code, text in EXIT_CODES.items()]
    return ["| code | meaning | raised as |", "|---|---|---|", *rows]


def render() -> str:
    """The page."""
    parts = [
        "# Commands",
        "",
        "What `weightops COMMAND --help` says of every command; exit codes and environment below.",
        "",
    ]
    parts += ["```", help_text(), "```", ""]
    for name in COMMANDS:
        parts += [f"## weightops {name}", "", "```", help_text(name), "```", ""]
    parts += ["## Exit codes", "", *exit_code_table(), ""]
    rows = [f"| `{name}` | {text} |" for name, text in ENVIRONMENT.items()]
    parts += ["## Environment", "", "Nothing else is read, and no option can be set so.", ""]
    parts += ["| variable | meaning |", "|---|---|", *rows, ""]
    return "\n".join(parts)


def files() -> dict[Path, str]:
    """Everything that this writes."""
    import json_schemas  # beside this file; imported here because it imports torch

    return {TARGET: render(), **json_schemas.render()}


if __name__ == "__main__":
    made = files()
    for folder in {path.parent for path in made} - {TARGET.parent}:
        folder.mkdir(exist_ok=True)
        for path in set(folder.iterdir()) - made.keys():
            path.unlink()
    for path, text in made.items():
        path.write_text(text)
