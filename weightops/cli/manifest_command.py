"""weightops manifest"""

from __future__ import annotations

from pathlib import Path

import click

from weightops import api
from weightops.cli.options import FOLDER, READ_CODES, epilog, report_options, workers_option
from weightops.cli.output import running, warn
from weightops.errors import OutputExists, UsageError
from weightops.formats.manifest import NAME
from weightops.io.atomic import check_target, write_whole
from weightops.io.escape import escape
from weightops.operations.manifest import checksum_list, earlier_manifest


@click.command("manifest", epilog=epilog((*READ_CODES[:-1], 11, 130)))
@click.argument("folder", type=FOLDER)
@click.option("--md5sums", "lists", flag_value="md5", help="Print what `md5sum -c` reads; write nothing.")
@click.option("--sha256sums", "lists", flag_value="sha256", help="Print what `sha256sum -c` reads; write nothing.")
@click.option("--xxh128sums", "lists", flag_value="xxh3_128", help="Print what `xxhsum -c` reads; write nothing.")
@click.option("--digest", "digests", multiple=True, metavar="NAME", help="Record md5, sha256, ... as well.")
@click.option("--overwrite", is_flag=True, help=f"Replace an existing {NAME}.")
@workers_option
@report_options
def command(
    folder: Path,
    lists: str | None,
    digests: tuple[str, ...],
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
    unused = [name for name, given in (("--json", as_json), ("--overwrite", overwrite), ("--digest", digests)) if given]
    if lists and unused:
        raise click.UsageError(f"a checksum list is printed as it is read by others: {unused[0]} has no use there.")
    target = folder / NAME
    if lists is not None and as_json:
        raise UsageError("a checksum list is no JSON", hint="leave out --json; the manifest is JSON")
    if lists is None:
        if target.exists() and not overwrite:
            raise OutputExists(f"{escape(str(target))} exists", hint="give --overwrite, or check it: weightops verify")
        if folder.is_dir():
            check_target(target)
    before = earlier_manifest(folder)
    with running(quiet) as control:
        chosen = (*digests, lists) if lists else digests
        made = api.manifest(folder, digests=chosen, workers=workers, control=control)
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
