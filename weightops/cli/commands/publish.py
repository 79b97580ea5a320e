"""weightops publish"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.colour import say
from weightops.cli.meter import human
from weightops.cli.options import report_options, workers_option
from weightops.cli.output import print_json, running, table, warn
from weightops.cli.params import FOLDER, Command, epilog
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.operations.publish import Publication


@click.command("publish", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 11, 13, 14, 16, 130)))
@click.argument("folder", type=FOLDER)
@click.argument("place", metavar="PLACE")
@click.option(
    "--create", is_flag=True, help="Make the repository if there is none; private, unless --public is given too."
)
@click.option("--public", is_flag=True, help="With --create: make it for everybody to see.")
@click.option("--delete", is_flag=True, help="Delete files at PLACE that the folder does not have, in the same commit.")
@click.option("--message", metavar="TEXT", help="What the commit is called; default: Publish org/name with weightops.")
@click.option(
    "--endpoint", metavar="URL", help="The hub to ask; default: what HF_ENDPOINT says, or https://huggingface.co."
)
@click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    help="Show whose PLACE is, who can see it, and which files would be sent and deleted. Send nothing.",
)
@workers_option
@report_options
def command(folder: Path, place: str, endpoint: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish a model on a hub or in a bucket: exactly the files that were verified.

    The files of FOLDER are held against its weightops-manifest.json, and the model is checked; what is damaged or
    broken is not published. Then the files that the manifest lists, README.md, model.sig and the manifest go to PLACE:
    hf://org/name, hf://org/name@branch, or s3://bucket/prefix. What is there already is not sent. If it is
    interrupted, the same command continues.

    \b
    Example:
      weightops publish ./zhixi hf://zjunlp/zhixi --create --dry-run
      weightops publish ./zhixi hf://zjunlp/zhixi --create

    On a hub everything appears at once, in one commit; if somebody else makes one meanwhile, none is made. In a bucket
    nothing is replaced, and the manifest comes last. Afterwards what the hub or the store lists is held against what
    was sent, file by file. Nothing at PLACE is deleted without --delete.

    The hub's token is that of HF_TOKEN, or of `hf auth login`; keys for buckets are those of the environment or ~/.aws.
    """
    from weightops.cli.network import open_web  # imported here because help and completion do without it

    with running(quiet, connect=lambda: open_web(endpoint=endpoint)) as control:
        found = weightops.publish(folder, place, control=control, **options)
    warn(found.warnings)
    if as_json:
        print_json(found.to_json())
    elif found.dry_run:
        say(_dry_run_text(found))
    elif not quiet:
        say(_text(found))


def _files(found: Publication) -> list[str]:
    rows = [("file", "size", "", "proof")]
    rows += [(escape(file.name), human(file.nbytes), file.status, escape(file.proof)) for file in found.files]
    return [
        table(rows, right=(1,)),
        "",
        *(f"delete      {escape(name)}" for name in found.deleted),
        *(f"stays       {escape(name)}" for name in found.kept),
        *(f"not sent    {escape(name)}" for name in found.not_sent),
    ]


def _dry_run_text(found: Publication) -> str:
    new = ", new" if found.created else ""
    return "\n".join(
        [
            *_files(found),
            f"place       {escape(found.destination)}{new}",
            f"owner       {escape(found.owner)}",
            f"visibility  {found.visibility}",
            f"send        {human(found.sent_nbytes)} of {human(found.nbytes)}",
        ]
    )


def _text(found: Publication) -> str:
    new = sum(file.status == "sent" for file in found.files)
    what = f"{new} sent, {human(found.sent_nbytes)}" if new else "nothing to send"
    at = f" at {found.version[:12]}" if found.version else ""
    summary = (
        f"{escape(found.destination)}{at} ({found.visibility}): {len(found.files)} files, {human(found.nbytes)}, {what}"
    )
    return "\n".join([*_files(found), summary])
