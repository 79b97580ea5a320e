"""weightops completion"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from weightops.cli.params import Command, OneOf

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", cls=Command, epilog="Exit codes: 0 done; 2 wrong usage.")
@click.argument("shell", type=OneOf(SHELLS))
def command(shell: str) -> None:
    """Print the script with which a shell completes weightops commands.

    With it the Tab key completes commands, options, their values, published names, files and folders. SHELL is bash
    (4.4 or newer), zsh or fish.

    \b
    Example:
      weightops completion bash > ~/.local/share/bash-completion/completions/weightops
      weightops completion zsh > ~/.zfunc/_weightops
      weightops completion fish > ~/.config/fish/completions/weightops.fish

    The next bash reads it, if the package bash-completion is installed; else put `source FILE` into ~/.bashrc.
    For zsh, ~/.zshrc needs `fpath+=~/.zfunc` before `autoload -Uz compinit; compinit`. fish reads it by itself.
    """
    from weightops.cli.main import COMPLETION, PROGRAM, cli

    found = get_completion_class(shell)
    assert found is not None
    # Not `source()`, which for bash runs bash to look at its version: scripts are also made for other machines.
    click.echo(found.source_template % found(cli, {}, PROGRAM, COMPLETION).source_vars())
