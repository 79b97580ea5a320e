"""weightops manifest"""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightops import api
from weightops.cli.options import (
    digest_option,
    dry_run_option,
    overwrite_option,
    refuse_unused,
    report_options,
    workers_option,
)
from weightops.cli.output import print_json, running, warn
from weightops.cli.params import FILE, FOLDER, READ_CODES, Command, epilog
from weightops.errors import OutputExists
from weightops.formats.proofs.manifest import NAME
from weightops.io.atomic import check_target, write_whole
from weightops.io.escape import escape
from weightops.operations.manifest import checksum_list, earlier_manifest

_OF_THE_FILE = ("out", "digest", "dry_run", "overwrite", "as_json")


@click.command("manifest", cls=Command, epilog=epilog((*READ_CODES[:-1], 11, 130)))
@click.argument("folder", type=FOLDER)
@click.option("-o", "--out", type=FILE, help=f"File to write; default: {NAME} in the folder.")
@click.option("--md5sums", "lists", flag_value="md5", help="Print a list that `md5sum -c` reads, and write nothing.")
@click.option(
    "--sha256sums", "lists", flag_value="sha256", help="Print a list that `sha256sum -c` reads, and write nothing."
)
@click.option(
    "--xxh128sums", "lists", flag_value="xxh3_128", help="Print a list that `xxhsum -c` reads, and write nothing."
)
@digest_option
@dry_run_option
@overwrite_option
@workers_option
@report_options
def command(
    folder: Path,
    out: Path | None,
    lists: str | None,
    digest: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Record the digests of a model's files, for later checks.

    Every file and every tensor of FOLDER is read, and its digest written to weightops-manifest.json in the folder,
    which `weightops verify` then compares with. Folders that weightops has written have one already.

    \b
    Example:
      weightops manifest ./model
      weightops manifest ./model --out ./model-manifest.json
      weightops manifest ./model --sha256sums > SHA256SUMS

    With --overwrite, what the earlier manifest tells of how these tensors were made is kept, and so are the digests
    that it had.
    """
    if lists:
        refuse_unused("with a checksum list, which is printed as others read it", *_OF_THE_FILE)
    target = out or folder / NAME
    if lists is None and not dry_run:
        if target.exists() and not overwrite:
            raise OutputExists(f"{escape(str(target))} exists", hint="give --overwrite, or check it: weightops verify")
        if folder.is_dir():
            check_target(target)
    before = earlier_manifest(folder)
    with running(quiet) as control:
        chosen = (*digest, lists) if lists else digest
        made = api.manifest(folder, digest=chosen, workers=workers, control=control)
    if lists:
        click.echo(checksum_list(made, lists), nl=False)
        return
    if not dry_run:
        write_whole(target, made.to_bytes())
    if before is not None and before.recipe != made.recipe:
        warn([f"{escape(str(target))}: the one before was of something else: what it told of the making is left out"])
    if as_json:
        print_json(json.loads(made.to_bytes()))
    elif not quiet:
        would = " would be written" if dry_run else ""
        click.echo(f"{escape(str(target))}{would}: {len(made.files)} files, {len(made.tensors)} tensors")
        click.echo(f"content {made.content_id}")
