"""weightops verify"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import weightops
from weightops.cli.colour import say, styled
from weightops.cli.meter import human
from weightops.cli.options import refuse_unused, report_options, trust_config_option, workers_option
from weightops.cli.output import escape_lines, print_json, running, save_report, warn
from weightops.cli.params import (
    DIGESTS,
    FILE,
    SEVERAL,
    SOURCE,
    Command,
    NameOrFile,
    OneOf,
    epilog,
    named,
    published,
    some,
)
from weightops.errors import WeightopsError
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.operations.verify import FileResult, VerifyReport


@click.command("verify", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 13, 130)))
@click.argument("folder", type=SOURCE)
@click.option(
    "--manifest",
    type=NameOrFile(published),
    metavar="FILE|NAME",
    help="Compare with this manifest, checksum list or published name; default: what lies in the folder.",
)
@click.option("--quick", is_flag=True, help="Compare sizes, headers and index only, and read no tensors.")
@click.option("--content", is_flag=True, help="Compare tensors, whatever files they are in.")
@click.option(
    "--extra",
    type=OneOf(named("operations.verify", "EXTRA_POLICIES")),
    help="What to do about files that are not on the list; default: warn, and fail with a signature.",
)
@click.option(
    "--algorithm",
    shell_complete=some(*DIGESTS),
    metavar="NAME",
    help="The digest that a checksum list holds, such as md5, if its name does not say it.",
)
@click.option(
    "--signature",
    type=FILE,
    help="Compare with this signature, such as model.sig, which has to be by the --key, --certificate or --identity.",
)
@click.option("--key", type=FILE, help="The public key, in PEM, of whoever has to have signed.")
@click.option(
    "--certificate",
    type=FILE,
    multiple=True,
    help=f"A file of certificates, in PEM, one of which has to vouch for the signer's. {SEVERAL}",
)
@click.option("--identity", metavar="NAME", help="Who has to have signed with Sigstore: a mail address or a URL.")
@click.option(
    "--issuer", metavar="URL", help="Who has to have known that identity, such as https://accounts.google.com."
)
@trust_config_option
@click.option("--junit", type=FILE, help="Write the result as JUnit XML, which continuous integration reads.")
@workers_option
@report_options
def command(
    folder: Path | str,
    manifest: str | None,
    quick: bool,
    content: bool,
    extra: str | None,
    algorithm: str | None,
    signature: Path | None,
    key: Path | None,
    certificate: tuple[Path, ...],
    identity: str | None,
    issuer: str | None,
    trust_config: Path | None,
    junit: Path | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check that the files of a model are the right ones.

    FOLDER, or a single file, is compared with a list of digests, numbers that change with any bit of a file: the
    weightops-manifest.json that lies in it, or another list. There is a line for each file and a verdict; the exit code
    is 0 if all is right and 3 if anything differs.

    \b
    Example:
      weightops verify ./zhixi
      weightops verify ./zhixi --manifest zhixi-13b-base
      weightops verify ./zhixi.gguf
      weightops verify hf://org/name
      weightops verify ./zhixi --signature ./zhixi/model.sig --key signer.pub

    Lists of md5sum, sha256sum, b3sum and xxhsum are read too, and Meta's checklist.chk. If files differ, the verdict
    says whether the tensors in them do, and which. A name such as hf://org/name[@revision] means the copy of that
    repository in the Hugging Face cache. It is compared with the digests of its hub, or, with HF_HUB_OFFLINE, with
    those that the cache names its files by.

    A signature is a list of digests under which somebody has put a name, as `weightops sign` and model-signing write
    it. Files that it does not list are wrong, too.
    """
    if content:
        refuse_unused("with --content, which compares tensors and no files", "extra", "algorithm")
    if junit is not None:
        from weightops.io.atomic import check_target

        check_target(junit)
    try:
        with running(quiet) as control:
            report = weightops.verify(
                folder,
                manifest,
                quick=quick,
                content=content,
                extra=extra,
                algorithm=algorithm,
                signature=signature,
                key=key,
                certificate=certificate,
                identity=identity,
                issuer=issuer,
                trust_config=trust_config,
                workers=workers,
                control=control,
            )
    except WeightopsError as error:
        if junit is not None:
            from weightops.operations.verify import junit_of_error

            save_report(junit, junit_of_error(str(folder), str(error)))
        raise
    warn(report.warnings)
    if as_json:
        print_json(report.to_json())
    elif not quiet or not report.verdict:
        say(_text(report))
    saved = save_report(junit, report.to_junit()) if junit is not None else 0
    click.get_current_context().exit(saved if report.verdict else 3)


def _text(report: VerifyReport) -> str:
    lines = [_line(file) for file in report.files]
    lines += [escape_lines(f"problem: {problem}") for problem in report.problems]
    for what, names in (
        ("differs", report.tensors_differ),
        ("is missing", report.tensors_missing),
        ("is not in the manifest", report.tensors_extra),
    ):
        lines += [f"tensor {escape(name)} {what}" for name in names]
    if report.signer is not None:
        lines.append(f"signed by {escape_lines(report.signer)}")
    return "\n".join([*lines, _verdict(report)])


def _line(file: FileResult) -> str:
    notes = [file.detail] if file.detail else []
    if file.status == "differs":
        notes.append(f"expected {file.expected}, found {file.found}")
    status = (
        file.status if file.status == "ok" else styled(file.status, "doubtful" if file.status == "extra" else "bad")
    )
    return f"{escape(file.name)}: {status}" + (f" ({escape_lines('; '.join(notes))})" if notes else "")


def _verdict(report: VerifyReport) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items() if count)
    rate = f"{human(report.nbytes)} in {report.elapsed_s:.1f} s" if report.nbytes else "nothing read"
    if report.mode == "content":
        what = styled("every tensor is equal", "good") if report.verdict else styled("tensors differ", "bad")
    else:
        word = "as" if report.verdict else "NOT as"
        what = styled(f"{word} {escape(report.manifest)} says", "good" if report.verdict else "bad")
        if report.content_equal:
            what += ": files differ, but every tensor is equal (--content compares tensors alone)"
    return f"{escape(report.folder)}: {what} ({', '.join(filter(None, [counts, rate]))})"
