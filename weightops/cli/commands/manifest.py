"""weightops manifest"""

from __future__ import annotations

from pathlib import Path

import click

from weightops import api
from weightops.cli.options import FOLDER, READ_CODES, epilog, refuse_unused, report_options, workers_option
from weightops.cli.output import running, warn
from weightops.errors import OutputExists
from weightops.formats.proofs.manifest import NAME
from weightops.io.atomic import check_target, write_whole
from weightops.io.escape import escape
from weightops.operations.manifest import checksum_list, earlier_manifest


@click.command("manifest", epilog=epilog((*READ_CODES[:-1], 11, 130)))
@click.argument("folder", type=FOLDER)
@click.option("--md5sums", "lists", flag_value="md5", help="Print what `md5sum -c` reads; write nothing.")
@click.option("--sha256sums", "lists", flag_value="sha256", help="Print what `sha256sum -c` reads; write nothing.")
@click.option("--xxh128sums", "lists", flag_value="xxh3_128", help="Print what `xxhsum -c` reads; write nothing.")
@click.option("--digest", multiple=True, metavar="NAME", help="Record md5, sha256, ... as well.")
@click.option("--overwrite", is_flag=True, help=f"Replace an existing {NAME}.")
@workers_option
@report_options
def command(
    folder: Path,
    lists: str | None,
    digest: tuple[str, ...],
    overwrite: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Digest every file and tensor of a folder, and keep the result in it as weightops-manifest.json.

    With --overwrite it keeps what the one before tells of how these tensors were made, and the digests that it had.

    \b
    Example:
      weightops manifest ./model
      weightops manifest ./model --sha256sums > SHA256SUMS
    """
    if lists:
        refuse_unused("with a checksum list, which is printed as others read it", "as_json", "overwrite", "digest")
    target = folder / NAME
    if lists is None:
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
    write_whole(target, made.to_bytes())
    if before is not None and before.recipe != made.recipe:
        warn([f"{escape(str(target))}: the one before was of something else: what it told of the making is left out"])
    if as_json:
        click.echo(made.to_bytes().decode(), nl=False)
    elif not quiet:
        click.echo(f"{escape(str(target))}: {len(made.files)} files, {len(made.tensors)} tensors")
        click.echo(f"content {made.content_id}")
