"""weightops vocab"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.options import out_option, write, write_options
from weightops.cli.params import FILE, SEED, SEVERAL, SOURCE, WRITE_CODES, Command, OneOf, epilog, named, some


@click.command("vocab", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option("--rows", type=int, metavar="N", help="Give the embeddings N rows, at least one for each token.")
@click.option("--multiple", type=int, metavar="M", help="Pad the embeddings to a multiple of M rows.")
@click.option("--add-token", multiple=True, metavar="TEXT", help=f"Add this token. {SEVERAL}")
@click.option("--special/--no-special", default=True, show_default=True, help="Whether added tokens are special.")
@click.option("--ends-turn", is_flag=True, help="The last --add-token, new or not, ends a turn: wherever that is said.")
@click.option("--chat-template", type=FILE, help="Make this file of Jinja the chat template.")
@click.option(
    "--init",
    default="mean",
    show_default=True,
    metavar="RULE",
    shell_complete=some("mean", "copy:", "pieces", "zero", "normal"),
    help="What rows of added tokens and of padding are: the mean of all old rows, copy:TOKEN, the mean of the rows of "
    "the token's pieces, zero, or normal, random with the model's own deviation.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help=SEED)
@click.option("--trim", type=FILE, help="Keep the tokens that this file of text needs, and those that spell any text.")
@click.option(
    "--tokenizer", type=SOURCE, help="Give the model the tokenizer of this one; but for omp its files will do."
)
@click.option(
    "--method",
    type=OneOf(named("operations.vocab", "Method")),
    help="With --tokenizer, how rows are made that the model lacks: from the pieces of the token's text (subword, the "
    "default), mean, zero, from common rows as the donor's row is (omp), or as draft models are made (draft).",
)
@click.option(
    "--k",
    type=int,
    metavar="N",
    help="Of how many common rows --method omp makes a new one; default: 64.",
)
@click.option(
    "--override",
    multiple=True,
    nargs=2,
    type=str,
    metavar="TOKEN TEXT",
    help=f"With --tokenizer, make the row of a token from this text of SOURCE's. {SEVERAL}",
)
@write_options
def command(source: Path | str, out: Path, override: tuple[tuple[str, str], ...], **options: Any) -> None:
    """Change a model's vocabulary: rows, tokens, tokenizer, ids.

    Rows of embeddings and heads, tokenizer files, config.json, generation_config.json and chat template are changed
    together, or the file that is not is named. Rows that stay are carried to the bit. SOURCE is a folder,
    hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops vocab ./model --rows 152064 --out ./model-padded
      weightops vocab ./base --add-token '<|im_end|>' --ends-turn --chat-template ./chatml.jinja --out ./base-chat
      weightops vocab ./model --trim ./corpus.txt --multiple 64 --out ./model-small
      weightops vocab ./small --tokenizer ./large --method draft --rows 152064 --out ./small-draft

    A trimmed tokenizer cuts the corpus as before, which is proven before anything is written, and spells any text that
    it could spell. With --tokenizer tokens are the same if they mean the same: special ones by what they are for.
    """
    if len(dict(override)) < len(override):
        raise click.UsageError("one token is given to --override twice.")
    write(weightops.vocab, source, out, override=dict(override), **options)
