"""weightops serve"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightops.cli.meter import human
from weightops.cli.options import run_model_options
from weightops.cli.output import running, table, warn
from weightops.cli.params import READ_CODES, SEVERAL, Command, epilog
from weightops.errors import Interrupted, UsageError
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.api import ComputeDType
    from weightops.inference.packed import Engine
    from weightops.inference.pool import Pool

_KEY = "WEIGHTOPS_API_KEY"


@click.command("serve", cls=Command, epilog=epilog((*READ_CODES[:-1], 16)))
@click.argument("models", nargs=-1, metavar="[NAME=]MODEL...")
@click.option("--model", multiple=True, metavar="[NAME=]MODEL", help=f"The same as MODEL. {SEVERAL}")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="The port; 0 takes one that is free."
)
@click.option(
    "--template",
    metavar="NAME|FILE",
    help="Chat template: the tokenizer's own, one of weightops' own by name, such as alpaca or vicuna, or a file.",
)
@click.option(
    "--remote",
    multiple=True,
    metavar="NAME=URL",
    help=f"Offer also a model of another server, such as b=http://127.0.0.1:8081/v1. {SEVERAL}",
)
@click.option(
    "--api-key",
    metavar="KEY",
    help=f"Answer only who gives this key; needed to listen on more than this machine. Better given as {_KEY}.",
)
@click.option(
    "--allow-host", multiple=True, metavar="NAME", help=f"Another name by which this server may be called. {SEVERAL}"
)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help=f"Let web pages of this origin, such as https://example.org, ask and read. {SEVERAL}",
)
@click.option("-n", "--dry-run", is_flag=True, help="Show which models would be in memory, and what they take.")
@run_model_options
@click.option("-q", "--quiet", is_flag=True, help="Show no progress and no summary, only errors.")
def command(
    models: tuple[str, ...],
    model: tuple[str, ...],
    host: str,
    port: int,
    template: str | None,
    remote: tuple[str, ...],
    api_key: str | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    dry_run: bool,
    dtype: ComputeDType,
    device: str,
    engine: Engine,
    max_memory: str | None,
    quiet: bool,
) -> None:
    """Serve models to a web page, and to programs that speak OpenAI's API.

    MODEL is a folder, hf://org/name[@revision] or a URL, or BASE+ADAPTER: a LoRA adapter on its base, merged as it is
    read. Requests call it by NAME, or by the last part of its path. Several models share the memory: those that fit
    together stay in it, others take turns.

    \b
    Example:
      weightops serve ./model
      weightops serve raw=./llama tuned=./zhixi chat=./llama+./adapter
      weightops serve ./model-gptq --remote full=http://127.0.0.1:8081/v1 --port 8080

    The page, at the address that is printed, puts one to several models side by side. The API is at /v1: chat
    completions, completions and models, streamed or not. Without --temperature in a request, the most probable token is
    always taken. Only this machine can reach the server, unless --host and --api-key say otherwise.
    """
    from weightops.serve.guard import LOOPBACK, Rules

    key = api_key if api_key is not None else os.environ.get(_KEY) or None
    if host not in LOOPBACK and key is None:
        raise UsageError(
            f"--host {escape(host)} lets other machines in, and there is no key to keep strangers out",
            hint=f"give --api-key KEY, or set {_KEY}",
        )
    names = named_models((*models, *model))
    try:
        from weightops.serve.run import bind
    except ImportError as error:
        raise UsageError(
            f"serving needs the extra web: {error.name} is not installed", hint="pip install 'weightops[web]'"
        ) from None
    from weightops.serve.remote import Joined, Remote, Remotes

    remotes = [Remote.parse(text) for text in remote]
    if not names and not remotes:
        raise UsageError("there is nothing to serve", hint="name a model: weightops serve ./model")
    rules = Rules.of([*allow_host, host], allow_origin, key)
    with running(quiet) as control:
        import weightops

        def open_local() -> Pool:
            pool = weightops.open_pool(
                names, dtype=dtype, device=device, engine=engine, max_memory=max_memory, control=control
            )
            warn([w for name in pool.names for w in pool.model(name).warnings])
            return pool

        if dry_run:
            if names:
                with open_local() as pool:
                    _show_plan(pool)
            return
        from weightops.inference.templates.template import named_templates
        from weightops.serve.app import Server
        from weightops.serve.engine import Engine as Texts
        from weightops.serve.local import Local
        from weightops.serve.run import run

        sock = bind(host, port)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{sock.getsockname()[1]}/"

        def open_engine() -> Texts:
            local = [Local(open_local(), template)] if names else []
            return Joined([*local, *([Remotes(remotes)] if remotes else [])])

        def ready(engine: Texts) -> None:
            if not quiet:
                click.echo(f"serving {', '.join(map(escape, engine.cards))} at {address} (Ctrl-C ends)", err=True)

        def is_over() -> bool:
            try:
                control.check()
            except Interrupted:
                return True
            return False

        run(Server(templates=tuple(named_templates())), rules, sock, open_engine, ready, is_over)


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Sources by the names that requests have for them."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists() or "/" in name:
            name, source = _last_part(text), text
        if not name or not source:
            raise UsageError(f"{escape(text)}: expected MODEL or NAME=MODEL")
        if name in found:
            raise UsageError(f"two models are called {escape(name)}", hint=f"name one of them: other={escape(source)}")
        found[name] = source
    return found


def _last_part(source: str) -> str:
    """What a model is called by default: the last name in its path, or org/name of a hub."""
    if source.startswith("hf://"):
        return source.removeprefix("hf://").partition("@")[0]
    return "+".join(Path(part).resolve().name or part for part in source.split("+")) if source else ""


def _show_plan(pool: Pool) -> None:
    rows: list[tuple[str, ...]] = [("model", "memory", "")]
    for each in pool.plan():
        how = "layers from disk" if each.streams_weights else "stays in memory" if each.stays else "takes turns"
        rows.append((escape(each.name), human(each.nbytes), f"{how}{', packed' if each.is_packed else ''}"))
    click.echo(table(rows, right=(1,)))
