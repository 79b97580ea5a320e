"""weightops env"""

from __future__ import annotations

import click

from weightops.cli.machine import Cache, EnvDocument, Gpu, describe
from weightops.cli.meter import human
from weightops.cli.options import json_option
from weightops.cli.output import print_json, table
from weightops.cli.params import Command
from weightops.io.escape import escape
from weightops.io.strict_json import as_json as to_json


@click.command("env", cls=Command, epilog="Exit codes: 0 done.")
@click.option("--gpu", is_flag=True, help="Ask torch which GPUs it can use, which takes some seconds.")
@json_option
def command(gpu: bool, as_json: bool) -> None:
    """Show versions, machine, disk and hub: what a bug report should say.

    \b
    Example:
      weightops env
      weightops env --gpu --json > env.json

    GPUs are those that nvidia-smi lists, or with --gpu those that torch can use. It is said whether a token for the hub
    is set; the token itself is never shown.
    """
    found = describe(ask_torch=gpu)
    if as_json:
        print_json(to_json(found))
    else:
        click.echo(_text(found))


def _text(found: EnvDocument) -> str:
    memory, disk, hub = found.memory, found.disk, found.hub
    rows = [(name, version or "not installed") for name, version in found.versions.items()]
    total = f"{human(memory.total_nbytes)}, " if memory.total_nbytes else ""
    rows += [
        ("system", found.system),
        ("cores", str(found.cores)),
        ("memory", f"{total}{human(memory.available_nbytes)} available"),
        ("disk", f"{human(disk.free_nbytes)} free of {human(disk.total_nbytes)} in {escape(disk.folder)}"),
        ("", f"file system {disk.kind}") if disk.kind else ("", ""),
        *(("gpu", _gpu(gpu)) for gpu in found.gpus or ()),
        *([] if found.gpus else [("gpu", _no_gpu(found))]),
        ("hub", escape(hub.endpoint) + (", not to be asked (HF_HUB_OFFLINE)" if hub.is_offline else "")),
        ("token", "set" if hub.has_token else "not set"),
        ("cache", f"{escape(hub.cache.path)}, {_size(hub.cache)}"),
    ]
    return table([row for row in rows if any(row)])


def _gpu(found: Gpu) -> str:
    return escape(found.name) + (f", {human(found.nbytes)}" if found.nbytes is not None else "")


def _no_gpu(found: EnvDocument) -> str:
    if found.gpus is None:
        return "nvidia-smi is not there; --gpu asks torch"
    return f"none, {found.gpus_by} says"


def _size(cache: Cache) -> str:
    if not cache.exists:
        return "not there"
    return human(cache.nbytes) if cache.nbytes is not None else "with too many files to count in half a second"
