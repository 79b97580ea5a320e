"""weightops sign"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.meter import human
from weightops.cli.options import (
    dry_run_option,
    overwrite_option,
    report_options,
    trust_config_option,
    workers_option,
)
from weightops.cli.output import print_json, running, warn
from weightops.cli.params import FILE, FOLDER, SEVERAL, Command, epilog
from weightops.io.escape import escape


@click.command("sign", cls=Command, epilog=epilog((0, 1, 2, 3, 10, 11, 13, 14, 16, 130)))
@click.argument("folder", type=FOLDER)
@click.option("-o", "--out", type=FILE, help="File to write; default: model.sig in the folder, or FILE.sig beside it.")
@click.option("--key", type=FILE, help="The private key to sign with, in PEM.")
@click.option("--password-file", type=FILE, help="A file whose first line unlocks the key.")
@click.option("--certificate", type=FILE, help="The certificate of the key, in PEM, which goes into the signature.")
@click.option(
    "--chain",
    type=FILE,
    multiple=True,
    help=f"Certificates, in PEM, that lead from that one to one that others trust. {SEVERAL}",
)
@click.option("--sigstore", is_flag=True, help="Sign with an identity instead of a key, by Sigstore's servers.")
@click.option(
    "--identity-token",
    type=FILE,
    help="A file with the OpenID Connect token to tell Sigstore who you are; default: the machine's, or a browser.",
)
@trust_config_option
@click.option("--allow-symlinks", is_flag=True, help="Sign links as the files in the folder that they lead to.")
@dry_run_option
@overwrite_option
@workers_option
@report_options
def command(folder: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Sign the files of a model, with a key or with Sigstore.

    Every file of FOLDER is read, and its SHA-256 digest put on a list under which the signature is: model.sig in the
    folder, a bundle of OpenSSF model signing. `weightops verify --signature` checks it, and so does model-signing.

    \b
    Example:
      openssl ecparam -name prime256v1 -genkey -noout -out signer.key
      openssl ec -in signer.key -pubout -out signer.pub
      weightops sign ./zhixi --key signer.key
      weightops verify ./zhixi --signature ./zhixi/model.sig --key signer.pub

    Where the folder has a weightops-manifest.json, its files are held against it first: what is damaged is not signed.
    The packages that it needs come with the extra sign, as in pip install 'weightops[sign]'.
    """
    with running(quiet) as control:
        made = weightops.sign(folder, control=control, **options)
    warn(made.warnings)
    if as_json:
        print_json(made.to_json())
    elif not quiet:
        would = " would be written" if made.dry_run else ""
        click.echo(f"{escape(made.signature)}{would}: {len(made.files)} files, {human(made.nbytes)}")
        click.echo(f"signed by {escape(made.signer)}" if not made.dry_run else "\n".join(map(escape, made.files)))
