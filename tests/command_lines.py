"""Commands by the words that run them: one, or for those of a group two."""

from __future__ import annotations

import click

from weightops.cli.main import cli

FUNCTIONS = {
    "eval": "evaluate",
    "adapter combine": "combine_adapters",
    "adapter rank": "resize_adapter",
    "adapter convert": "convert_adapter",
}
"""Functions of Python that are not called as the command is."""


def command_of(line: str) -> click.Command:
    command: click.Command = cli
    context = click.Context(cli)
    for name in line.split():
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None
        command = found
    return command


def function_name(line: str) -> str:
    return FUNCTIONS.get(line, line.replace("-", "_"))


def line_of(verb: str) -> str:
    """The words that run an operation."""
    return next((line for line, name in FUNCTIONS.items() if name == verb.replace("-", "_")), verb)
