"""Write what of the documents is made from the code: `python docs/generate.py`. Tests hold the two together.

That is docs/commands.md, from the commands' own help, docs/schemas/, from the types of what
they print and write, and docs/man/, manual pages from the help.
"""

from __future__ import annotations

from pathlib import Path

import click

from weightops import errors
from weightops.cli.main import COMMANDS, ENVIRONMENT, EXIT_CODES, SUBCOMMANDS, cli

COMPLETION = """\
bash, zsh and fish complete commands, options, their values, published names, files and folders, once they have read
the script that `weightops completion` prints:

    weightops completion bash > ~/.local/share/bash-completion/completions/weightops
    weightops completion zsh > ~/.zfunc/_weightops
    weightops completion fish > ~/.config/fish/completions/weightops.fish

bash needs the package bash-completion for that; without it, write the script anywhere and put `source FILE` into
`~/.bashrc`. For zsh, `~/.zshrc` needs `fpath+=~/.zfunc` before `autoload -Uz compinit; compinit`. It takes effect in
the next shell. After an update of weightops the scripts need not be written again: they ask the program."""
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
        for own in SUBCOMMANDS.get(name, ()):
            parts += [f"### weightops {name} {own}", "", "```", help_text(name, own), "```", ""]
    parts += ["## Completion", "", COMPLETION, ""]
    parts += ["## Exit codes", "", *exit_code_table(), ""]
    rows = [f"| `{name}` | {text} |" for name, text in ENVIRONMENT.items()]
    parts += ["## Environment", "", "Nothing else is read, and no option can be set so.", ""]
    parts += ["| variable | meaning |", "|---|---|", *rows, ""]
    return "\n".join(parts)


def files() -> dict[Path, str]:
    """Everything that this writes."""
    import json_schemas  # beside this file; imported here because it imports torch
    import man

    return {TARGET: render(), **json_schemas.render(), **man.render()}


if __name__ == "__main__":
    made = files()
    for folder in {path.parent for path in made} - {TARGET.parent}:
        folder.mkdir(exist_ok=True)
        for path in set(folder.iterdir()) - made.keys():
            path.unlink()
    for path, text in made.items():
        path.write_text(text)
