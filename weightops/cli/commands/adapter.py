"""weightops adapter"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.colour import say
from weightops.cli.options import out_option, write, write_options
from weightops.cli.output import table
from weightops.cli.params import FLOATS, SEED, SOURCE, WRITE_CODES, Command, NumberType, OneOf, epilog, named
from weightops.errors import UsageError
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.plan import Plan
    from weightops.recipes.execute import Result

_NUMBER = re.compile(r"\.\d+(?=\.)")
_DTYPE = click.option("--dtype", type=NumberType(FLOATS), help="The number type of the adapter; default: float32.")


@click.group("adapter", no_args_is_help=False, epilog=epilog(WRITE_CODES))
def command() -> None:
    """Combine LoRA adapters, change their ranks, and convert them.

    Nothing here needs the model that they were trained on. What comes out is an adapter that peft loads; `weightops
    inspect` looks at one, and `weightops merge-lora` merges it into a model.

    \b
    Example:
      weightops adapter combine ./style ./facts --weights 0.75,-0.5 --out ./both
      weightops adapter combine ./style ./facts --method svd --rank 16 --out ./both
      weightops adapter rank ./style --keep 0.99 --out ./smaller
      weightops adapter convert ./style --to mlx --out ./style-mlx

    Each of them has a help of its own: `weightops adapter COMMAND --help`.
    """


@command.command("combine", cls=Command, short_help="Make one adapter of several.", epilog=epilog(WRITE_CODES))
@click.argument("adapter", nargs=-1, required=True, type=SOURCE, metavar="ADAPTER...")
@out_option
@click.option(
    "--weight",
    "--weights",
    multiple=True,
    metavar="NUMBER[,...]",
    help="How strongly each adapter counts, in their order; 1 is as it was trained, and below 0 takes it away.",
)
@click.option(
    "--method",
    type=OneOf(named("ops.lora.combined", "METHODS")),
    default="cat",
    show_default=True,
    help="How to combine: cat and svd are exact, but for the rank that svd is given; others are peft's, and are not.",
)
@click.option(
    "--density",
    type=float,
    metavar="SHARE",
    help="The share of each adapter's numbers that is kept: ties, dare, magnitude_prune.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="The rank of every module, for methods that end in svd; default: the highest that an adapter has there.",
)
@click.option(
    "--vote",
    type=OneOf(named("ops.lora.arithmetic", "SignVote")),
    default="total",
    show_default=True,
    help="What decides on a sign in ties: the sum of the numbers, or how many have it.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help=SEED)
@_DTYPE
@write_options
def combine(adapter: tuple[Path | str, ...], out: Path, weight: tuple[str, ...], **options: Any) -> None:
    """Make one adapter of several, in the place of all.

    The result changes a model as all of them do together, each times its weight. cat holds the factors of all, so its
    rank is the sum of theirs, and nothing is lost; svd is the best adapter of a lower rank.

    \b
    Example:
      weightops adapter combine ./style ./facts --weights 0.75,-0.5 --out ./both
      weightops adapter combine ./style ./facts --method svd --rank 16 --out ./both
      weightops adapter combine ./style ./facts --method ties --density 0.5 --out ./both

    The other methods are those of peft's add_weighted_adapter: linear, ties, dare_linear, dare_ties and
    magnitude_prune put A and B together apart from each other, which is not the sum of what the adapters do; how far it
    is off is shown, and recorded in weightops-manifest.json. With _svd they work on whole products, of the size of the
    model's weights: --dry-run says what that takes. Ranks and scales may differ by module and by adapter.
    """
    _write(weightops.combine_adapters, adapter, out, weight=tuple(_numbers(weight)), **options)


def _numbers(given: Iterable[str]) -> Iterable[float]:
    """Numbers that are given one by one, or several with commas between them."""
    for text in given:
        for part in text.split(","):
            try:
                yield float(part)
            except ValueError:
                raise UsageError(f"--weight {escape(text)}: expected numbers, found {escape(part)!r}") from None


@command.command("rank", cls=Command, short_help="Give an adapter another rank.", epilog=epilog(WRITE_CODES))
@click.argument("adapter", type=SOURCE)
@out_option
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="The rank of every module; with --keep the highest that a module may get.",
)
@click.option(
    "--keep",
    type=float,
    metavar="SHARE",
    help="Give each module the least rank that keeps this share of its change, such as 0.99.",
)
@click.option(
    "--by",
    type=OneOf(named("operations.adapter", "Measure")),
    default="squares",
    show_default=True,
    help="What --keep measures of the singular values: the sum of squares, or as sd-scripts the root of that (sv_fro), "
    "the sum (sv_cumulative), or the ratio of the largest to the smallest kept (sv_ratio, 1 or more).",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help=SEED)
@_DTYPE
@write_options
def rank(adapter: Path | str, out: Path, **options: Any) -> None:
    """Give an adapter another rank, the same for all modules or what each one needs.

    A lower rank is the best one can do with so many; what that loses is shown by module. A higher one changes nothing,
    and leaves room to train on.

    \b
    Example:
      weightops adapter rank ./style --rank 8 --out ./smaller
      weightops adapter rank ./style --keep 0.99 --out ./smaller
      weightops adapter rank ./style --keep 0.9 --by sv_fro --rank 32 --out ./smaller

    A module that keeps its rank keeps its numbers. `weightops inspect ADAPTER --stats` shows which ranks are needed.
    """
    _write(weightops.resize_adapter, adapter, out, **options)


@command.command(
    "convert", cls=Command, short_help="Name and store an adapter as another program does.", epilog=epilog(WRITE_CODES)
)
@click.argument("adapter", type=SOURCE)
@out_option
@click.option(
    "--to",
    type=OneOf(named("operations.adapter", "Program")),
    required=True,
    help="Whose adapter to write; whose it is now, its names say.",
)
@click.option(
    "--base",
    type=SOURCE,
    help="The model that the adapter is for, of which heads and names are read; no weights are.",
)
@click.option(
    "--heads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of attention heads, for torchtune's order of rows, where there is no --base.",
)
@click.option("--alpha", type=float, metavar="NUMBER", help="The alpha of an adapter whose own files do not say it.")
@write_options
def convert(adapter: Path | str, out: Path, **options: Any) -> None:
    """Convert an adapter between peft, torchtune, LitGPT, mlx-lm and sd-scripts.

    Factors keep their bits; names, the order of rows and how the scale is said are the other program's. What a program
    has no place for is refused by name.

    \b
    Example:
      weightops adapter convert ./style --to mlx --out ./style-mlx
      weightops adapter convert ./style --to torchtune --base ./model --out ./style-torchtune
      weightops adapter convert ./style-mlx --to peft --out ./style-peft

    \b
    Programs:
      peft        adapter_model.safetensors, adapter_config.json
      torchtune   its names; rows of q and k in Meta's rotary order, by heads
      lit         LitGPT: lit_model.pth.lora, hyperparameters.yaml; q, k and v in one
      mlx         mlx-lm: adapters.safetensors; factors the other way round, one scale
      kohya       sd-scripts: lora.safetensors; underscores for dots, an alpha each
    """
    _write(weightops.convert_adapter, adapter, out, **options)


def _write(function: Callable[..., Result], *arguments: Any, **options: Any) -> None:
    """Write as every command does; with --dry-run say besides what is done."""
    is_text = not options["as_json"]
    result = write(function, *arguments, **options)
    if result.manifest is None and is_text:
        say(f"\n{_what_is_done(result.plan)}")


def _what_is_done(plan: Plan) -> str:
    """What becomes of modules, those of all layers in one line."""
    from weightops.ops.lora.combined import CombinedFactor

    counts: dict[tuple[str, str, str], int] = {}
    for name, tensor in plan.tensors:
        made = next((node for node in tensor.walk() if isinstance(node.op, CombinedFactor)), None)
        if made is None or not isinstance(made.op, CombinedFactor):
            row = (name, "", f"{tensor.spec.dtype.value} {list(tensor.spec.shape)}")
        elif made.op.part == "a":
            ranks = " + ".join(str(each.spec.shape[0] // made.op.experts) for each in made.inputs[::2])
            row = (made.op.label, f"{made.op.method} of rank {ranks}", f"rank {made.op.rank}")
        else:
            continue
        row = (_NUMBER.sub(".*", row[0]), *row[1:])
        counts[row] = counts.get(row, 0) + 1
    rows = [(escape(name), str(count), how, what) for (name, how, what), count in counts.items()]
    return table([("what", "count", "made by", "becomes"), *rows], right=(1,))
