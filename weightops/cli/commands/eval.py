"""weightops eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import weightops
from weightops.cli.colour import say
from weightops.cli.divergence import divergence_text
from weightops.cli.options import report_options, run_model_options
from weightops.cli.output import print_json, running, table, warn
from weightops.cli.params import FILE, READ_CODES, SEQ_LEN, SOURCE, Command, epilog
from weightops.cli.use import experts_text, layers_text
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.api import ComputeDType
    from weightops.inference.evaluate import Evaluation, Score
    from weightops.inference.packed import Engine

_SHOWN_MODULES = 8
"""Modules with the largest errors that the text shows; --json has all."""


@click.command("eval", cls=Command, epilog=epilog((*READ_CODES[:-1], 16, 130)))
@click.argument("source", nargs=-1, required=True, type=SOURCE)
@click.option(
    "--text",
    multiple=True,
    required=True,
    metavar="FILE",
    type=FILE,
    help="Text to predict, in UTF-8. Can be given several times; blank lines are put between.",
)
@click.option(
    "--seq-len", type=click.IntRange(2), metavar="N", help=f"Tokens in each window of the text; default: {SEQ_LEN}."
)
@click.option("--reference", type=SOURCE, metavar="DIR", help="Measure also how far each model is from this one.")
@click.option(
    "--influence",
    is_flag=True,
    help="Say also how much each layer changes of what passes through it, and which layers in a row change the least.",
)
@click.option(
    "--experts",
    type=FILE,
    help="Write how the experts of a mixture are used to this JSON file, which `weightops experts --keep` takes, and "
    "say it in short. One SOURCE.",
)
@run_model_options
@report_options
def command(
    source: tuple[Path | str, ...],
    text: tuple[Path, ...],
    seq_len: int | None,
    reference: Path | str | None,
    influence: bool,
    experts: Path | None,
    dtype: ComputeDType,
    device: str,
    engine: Engine,
    max_memory: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how well a model predicts a text, and how far it is from another.

    SOURCE is a model that transformers knows, with its tokenizer: a folder, hf://org/name[@revision] or a URL. Several
    are measured one after the other. The lower the perplexity, the better the prediction. With --reference, the
    predictions are compared with those of another model: by KL divergence, by how often both find the same next token
    the most probable, and by where in the text they part.

    \b
    Example:
      weightops eval ./model --text heldout.txt
      weightops eval ./model-gptq --reference ./model --text heldout.txt --seq-len 512 --json > eval.json
      weightops eval ./moe --text heldout.txt --experts use.json
      weightops experts ./moe --keep use.json --count 64 --out ./moe-64

    A model runs block by block, so that memory holds one block and the states of the text at that point, whatever the
    size of the model. The text is cut into windows that do not overlap. Of quantised models (GPTQ), --reference also
    gives the error of each layer.

    What could be left out of a model is measured in the same walk. --influence gives the block influence of every layer
    (one minus the cosine between what enters it and what leaves it) and the angular distance over several in a row;
    weightops shard --layers writes a model without them. --experts gives how often each expert is chosen and its score
    by REAP: how much it adds to the tokens that come to it.
    """
    with running(quiet) as control:
        found = weightops.evaluate(
            source,
            text,
            seq_len=seq_len,
            reference=reference,
            dtype=dtype,
            device=device,
            engine=engine,
            max_memory=max_memory,
            influence=influence,
            experts=experts,
            control=control,
        )
    warn(found.warnings)
    if as_json:
        print_json(found.to_json())
    else:
        say(_text(found))


def _text(found: Evaluation) -> str:
    heads = ("model", "perplexity", "tokens", "windows")
    has_agreement = found.reference is not None
    rows: list[tuple[str, ...]] = [(*heads, "mean KL", "max KL", "top-1") if has_agreement else heads]
    rows += [_row(score, has_agreement) for score in found.scores]
    lines = [table(rows, right=range(1, len(rows[0])))]
    for score in found.scores:
        if score.agreement is not None:
            lines += ["", divergence_text(score, found.scores[0])]
            lines += ["", _modules(score)] if score.agreement.modules else []
        lines += ["", layers_text(score)] if score.layers is not None else []
        lines += ["", experts_text(score)] if score.experts is not None else []
    return "\n".join([*lines, "", found.convention + (_KL_CONVENTION if has_agreement else "")])


_KL_CONVENTION = "; KL in nats, of each model from the reference"


def _row(score: Score, has_agreement: bool) -> tuple[str, ...]:
    row = (escape(score.name), f"{score.perplexity:.4f}", str(score.tokens), str(score.windows))
    if not has_agreement:
        return row
    if score.agreement is None:
        return (*row, "", "", "reference")
    found = score.agreement
    return (*row, f"{found.kl_mean:.3g}", f"{found.kl_max:.3g}", f"{100 * found.top1:.2f} %")


def _modules(score: Score) -> str:
    assert score.agreement is not None
    errors = score.agreement.modules
    worst = sorted(errors.items(), key=lambda item: -item[1])[:_SHOWN_MODULES]
    rows = [(f"{escape(score.name)}: largest of {len(errors)} modules", "output error")]
    rows += [(escape(name), f"{100 * error:.3g} %") for name, error in worst]
    return table(rows, right=(1,))
