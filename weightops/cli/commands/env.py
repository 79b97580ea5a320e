"""weightops env"""

from __future__ import annotations

import os
import platform

import click

from weightops.cli.output import print_json, table
from weightops.cli.progress import human
from weightops.io.platform.machine import available_memory
from weightops.version import library_versions


@click.command("env", epilog="Exit codes: 0 done.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json: bool) -> None:
    """Show versions and machine, for bug reports.

    \b
    Example:
      weightops env
    """
    machine = {"system": platform.platform(), "cores": str(os.cpu_count()), "memory": human(available_memory())}
    found = {**library_versions(), **machine}
    if as_json:
        print_json({"schema": "weightops-env/1", **found})
    else:
        click.echo(table(list(found.items())))
