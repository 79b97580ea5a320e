"""weightops download"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.colour import say
from weightops.cli.hub_cache import hub_cache, is_offline
from weightops.cli.meter import duration, human
from weightops.cli.options import refuse_unused, report_options
from weightops.cli.output import print_json, running, table, warn
from weightops.cli.params import GLOB, OUT, Command, NameOrFile, epilog, published
from weightops.errors import UsageError
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.operations.download import Download

_OF_FOLDERS = ("out", "sha256", "md5", "checksums", "prune", "overwrite", "offline")
"""What says how a folder is written, or is for one URL."""
_OF_SERVERS = ("sha256", "md5", "checksums", "prune", "overwrite")
"""What says which files to fetch, and how they are held against digests that come from elsewhere."""


@click.command("download", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 11, 13, 14, 16, 130)))
@click.argument("source", type=NameOrFile(published))
@click.option(
    "-o",
    "--out",
    type=OUT,
    help="Folder to write, or s3://BUCKET/PREFIX. Files appear in it one by one, each when it is complete.",
)
@click.option("--cache", is_flag=True, help="Download into the Hugging Face cache, not into a folder.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a repository; org/name@NAME says the same.")
@click.option("--include", multiple=True, metavar="GLOB", help=f"Download only files of such names. {GLOB}")
@click.option("--exclude", multiple=True, metavar="GLOB", help=f"Leave out files of such names. {GLOB}")
@click.option("--sha256", metavar="HEX", help="The SHA-256 digest that the file at a URL must have.")
@click.option("--md5", metavar="HEX", help="The MD5 digest that the file at a URL must have.")
@click.option(
    "--checksums",
    type=NameOrFile(tuple),
    metavar="LIST",
    help="A checksum list, at a path or URL, that the file at a URL must agree with.",
)
@click.option(
    "--endpoint", metavar="URL", help="The hub to ask; default: what HF_ENDPOINT says, or https://huggingface.co."
)
@click.option("--workers", type=click.IntRange(1, 64), metavar="N", help="Number of connections at once; default: 4.")
@click.option("--limit-rate", metavar="SIZE", help="Take at most so many bytes per second, such as 5MB.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="Give up a connection on which nothing has come for so many seconds, and try again.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="Give up the whole download after so many seconds.",
)
@click.option("--prune", is_flag=True, help="Remove files of an earlier version that this version no longer has.")
@click.option("--overwrite", is_flag=True, help="Replace files of the same names that no download brought.")
@click.option("--offline", is_flag=True, help="Ask no server, and only say whether the folder is complete.")
@click.option(
    "-n", "--dry-run", is_flag=True, help="Show which files would be downloaded, and how large they are. Write nothing."
)
@report_options
def command(
    source: str,
    out: Path | str | None,
    cache: bool,
    endpoint: str | None,
    limit_rate: str | None,
    timeout: float,
    deadline: float | None,
    offline: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Download a model, and check every file against its digest.

    SOURCE is org/name[@revision] on a Hugging Face hub, the address of a page there, the URL of one file, a published
    name such as zhixi-13b-diff, or a text file with lines `DIGEST  URL`. If the download is interrupted, the same
    command continues it.

    \b
    Example:
      weightops download zjunlp/knowlm-13b-diff --out ./zhixi-diff
      weightops download zhixi-13b-diff --out ./zhixi-diff
      weightops download zjunlp/knowlm-13b-diff --cache
      weightops download https://example.org/model.safetensors --sha256 HEX --out ./model

    A file gets its name only when it is complete and has the digest that its source or list says. Files of which the
    source says no digest are named in a warning. A list of what came, with digests, is left in the folder as
    weightops-manifest.json, for `weightops verify`.

    With --cache a repository goes into the Hugging Face cache, in which transformers and huggingface_hub find it, as
    other commands do that are given hf://org/name. Nothing there is replaced or removed.
    """
    # Imported here because help and completion do without them.
    from weightops.cli.network import hub_endpoint, open_web
    from weightops.plan import parse_size
    from weightops.stores.web.policy import Policy
    from weightops.stores.web.web import Web

    if cache:
        refuse_unused("with --cache, which a repository of a hub is added to, and nothing else", *_OF_FOLDERS)
    elif out is None:
        raise UsageError("there is no folder to write", hint="give --out DIR, or --cache for the Hugging Face cache")
    if offline:
        refuse_unused("with --offline, where no server is asked", *_OF_SERVERS)
    offline = (offline or is_offline()) and not cache
    limit = parse_size(limit_rate) if limit_rate else None
    policy = Policy(timeout_s=timeout, deadline_s=deadline, limit_rate=limit)

    def connect() -> Web:
        if offline:
            return Web(endpoint=hub_endpoint(endpoint))  # which says what URLs of that hub mean; nobody is asked
        return open_web(endpoint=endpoint, policy=policy)

    with running(quiet, connect=connect, policy=policy) as control:
        place = hub_cache() if cache else None
        found = weightops.download(source, out, cache=place, offline=offline, control=control, **options)
    warn(found.warnings)
    if as_json:
        from weightops.operations.download import download_json

        print_json(download_json(found))
    elif not found.is_complete:
        say(_dry_run_text(found, limit))
    elif not quiet:
        say(_text(found))


def _version(found: Download) -> str:
    commit, revision = found.listing.commit, found.listing.revision
    if not revision:
        return ""
    return f" at {escape(revision)}" + (f" ({commit[:12]})" if commit != revision else "")


def _text(found: Download) -> str:
    new = found.nbytes - sum(found.have.values())
    what = f"{human(new)} fetched" if len(found.have) < len(found.files) else "nothing to fetch"
    return (
        f"{escape(str(found.out))}: {escape(found.listing.source)}{_version(found)},"
        f" {len(found.files)} files, {human(found.nbytes)}, {what}"
    )


def _dry_run_text(found: Download, limit: int | None) -> str:
    from weightops.engine.preflight import free_disk
    from weightops.stores.transfer.partial import STATE

    rows = [("file", "size", "")]
    for file in found.files:
        size = human(file.nbytes) if file.nbytes is not None else "?"
        rows.append((escape(file.name), size, "here" if file.name in found.have else ""))
    missing = found.nbytes - sum(found.have.values())
    lines = [
        table(rows, right=(1,)),
        "",
        f"source   {escape(found.listing.source)}{_version(found)}",
        f"fetch    {human(missing)} of {human(found.nbytes)}",
    ]
    if isinstance(found.out, Path):
        lines.append(f"disk     {human(free_disk(found.out / STATE))} free")
    if limit is not None and missing:
        lines.insert(5, f"time     at least {duration(missing / limit)} at {human(limit)}/s (--limit-rate)")
    return "\n".join([*lines, *(f"stale    {escape(name)}" for name in found.stale)])
