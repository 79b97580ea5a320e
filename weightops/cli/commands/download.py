"""weightops download"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops import api
from weightops.cli.hub_cache import hub_cache, is_offline
from weightops.cli.network import hub_endpoint, open_web
from weightops.cli.options import FOLDER, epilog, refuse_unused, report_options
from weightops.cli.output import print_json, running, table, warn
from weightops.cli.progress import human
from weightops.engine.preflight import free_disk
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.plan import parse_size
from weightops.stores.transfer.partial import STATE
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

if TYPE_CHECKING:
    from weightops.operations.download import Download

_OF_FOLDERS = ("out", "sha256", "md5", "checksums", "prune", "overwrite", "offline")
"""What says how a folder is written, or is for one URL."""
_OF_SERVERS = ("sha256", "md5", "checksums", "prune", "overwrite")
"""What says which files to fetch, and how they are held against digests that come from elsewhere."""


@click.command("download", epilog=epilog((0, 1, 2, 3, 10, 11, 13, 14, 16, 130)))
@click.argument("source")
@click.option("-o", "--out", type=FOLDER, help="Folder to write; files appear in it one by one.")
@click.option("--cache", is_flag=True, help="Fill the Hugging Face cache (HF_HUB_CACHE) in the place of a folder.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a repository; also org/name@NAME.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only files that match.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="All but files that match.")
@click.option("--sha256", metavar="HEX", help="What the file at a URL must have.")
@click.option("--md5", metavar="HEX", help="The same by MD5.")
@click.option("--checksums", metavar="LIST", help="A checksum list, at a path or URL, for the file at a URL.")
@click.option("--endpoint", metavar="URL", help="Another hub; default: HF_ENDPOINT, or huggingface.co.")
@click.option("--workers", type=click.IntRange(1, 64), help="Connections at once; default 4.")
@click.option("--limit-rate", metavar="SIZE", help="Bytes per second for all connections, such as 5MB.")
@click.option(
    "--timeout", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Seconds of silence, or near it."
)
@click.option("--deadline", type=click.FloatRange(0.1), help="Seconds for the whole.")
@click.option("--prune", is_flag=True, help="Remove files of an earlier version that this one no longer has.")
@click.option("--overwrite", is_flag=True, help="Replace files in the folder that no download brought.")
@click.option("--offline", is_flag=True, help="Ask no server: is the folder complete as it is?")
@click.option("-n", "--dry-run", is_flag=True, help="Show files, bytes and what is there; fetch nothing.")
@report_options
def command(
    source: str,
    out: Path | None,
    cache: bool,
    sha256: str | None,
    md5: str | None,
    endpoint: str | None,
    limit_rate: str | None,
    timeout: float,
    deadline: float | None,
    offline: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Fetch a repository, a URL, a list of URLs or a published name, and prove every file right.

    SOURCE is org/name[@revision] on a Hugging Face hub, the URL of a page there (of a repository, folder or file), an
    http(s) URL of one file, a file with lines `DIGEST  URL`, or a name such as zhixi-13b-diff. Every file is compared
    with the digest that its source or list gives before it gets its name, and named if there is none. Whatever
    happens, the same command continues, and fetches a few MB twice at most.

    With --cache a repository goes into the Hugging Face cache, in which transformers and huggingface_hub find it, as
    other commands do that are given hf://org/name. Nothing there is replaced or removed.

    \b
    Example:
      weightops download zjunlp/knowlm-13b-diff --out ./zhixi-diff
      weightops download zhixi-13b-diff --out ./zhixi-diff
      weightops download zjunlp/knowlm-13b-diff --cache
      weightops download https://example.org/model.safetensors --sha256 HEX --out ./model
    """
    if cache:
        refuse_unused("with --cache, which a repository of a hub is added to, and nothing else", *_OF_FOLDERS)
    elif out is None:
        raise UsageError("there is no folder to write", hint="give --out DIR, or --cache for the Hugging Face cache")
    if offline:
        refuse_unused("with --offline, where no server is asked", *_OF_SERVERS)
    offline = (offline or is_offline()) and not cache
    digests = {name: digest for name, digest in (("sha256", sha256), ("md5", md5)) if digest}
    limit = parse_size(limit_rate) if limit_rate else None
    policy = Policy(timeout_s=timeout, deadline_s=deadline, limit_rate=limit)

    def connect() -> Web:
        if offline:
            return Web(endpoint=hub_endpoint(endpoint))  # which says what URLs of that hub mean; nobody is asked
        return open_web(endpoint=endpoint, policy=policy)

    with running(quiet, events=as_json, connect=connect) as control:
        found = api.download(
            source,
            out,
            cache=hub_cache() if cache else None,
            digests=digests,
            offline=offline,
            control=control,
            **options,
        )
    warn(found.warnings)
    if as_json:
        print_json(_document(found))
    elif not found.is_complete:
        click.echo(_dry_run_text(found))
    elif not quiet:
        click.echo(_text(found))


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


def _dry_run_text(found: Download) -> str:
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
        f"disk     {human(free_disk(found.out / STATE))} free",
    ]
    return "\n".join([*lines, *(f"stale    {escape(name)}" for name in found.stale)])


def _document(found: Download) -> dict[str, Any]:
    return {
        "schema": "weightops-download/1",
        "out": str(found.out),
        "source": found.listing.source,
        "revision": found.listing.revision,
        "commit": found.listing.commit,
        "complete": found.is_complete,
        "nbytes": found.nbytes,
        "files": [
            {"name": file.name, "nbytes": file.nbytes, "digests": dict(file.digests), "here": file.name in found.have}
            for file in found.files
        ],
        "stale": list(found.stale),
        "unproven": list(found.unproven),
        "warnings": list(found.warnings),
    }
