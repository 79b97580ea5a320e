"""Options of the commands that run a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from weightops.cli.options import OneOf

_Command = TypeVar("_Command", bound=Callable[..., Any])


def run_model_options(command: _Command) -> _Command:
    """--dtype, --device, --engine and --max-memory."""
    options = (
        click.option(
            "--dtype",
            type=OneOf(("float32", "bfloat16", "float16")),
            default="float32",
            show_default=True,
            help="What to compute in.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option(
            "--engine",
            type=OneOf(("auto", "dequantized", "packed")),
            default="auto",
            show_default=True,
            help="Of quantised models: make full weights as they are loaded, or keep integers and multiply with them. "
            "auto: packed where that is faster, or nothing else fits.",
        ),
        click.option("--max-memory", metavar="SIZE", help="Take no more, as far as can be: 8GB, 500MB; default: free."),
    )
    for option in reversed(options):
        command = option(command)
    return command
