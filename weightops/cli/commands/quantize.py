"""weightops quantize"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.colour import say
from weightops.cli.meter import human, percent
from weightops.cli.options import out_option, refuse_unused, write_here_options
from weightops.cli.output import print_json, running, save_report, table, warn
from weightops.cli.params import (
    CONTAINER,
    DEVICE,
    FILE,
    GLOB,
    GROUP_SIZE,
    SEED,
    SEQ_LEN,
    SOURCE,
    WEIGHT_BITS,
    WRITE_CODES,
    Command,
    OneOf,
    epilog,
    named,
    some,
)
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.api import Quantization
    from weightops.quantization.options import ModuleReport

_SHOWN = 5
_OF_GPTQ = ("act_order", "static_groups", "calibration", "samples", "seq_len", "seed", "damp_percent")


@click.command("quantize", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@out_option
@click.option(
    "--calibration",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to calibrate with: a text file or JSONL. Can be given several times.",
)
@click.option(
    "--bits", type=OneOf(named("ops.numbers.bitpack", "BITS")), default="4", show_default=True, help=WEIGHT_BITS
)
@click.option("--group-size", type=int, metavar="N", default=128, show_default=True, help=GROUP_SIZE)
@click.option(
    "--sym/--asym",
    default=True,
    show_default=True,
    help="Let integers stand for numbers around zero, or for a range with a zero point of its own.",
)
@click.option(
    "--act-order",
    is_flag=True,
    help="Take the inputs with the largest activations first: more accurate at low bits, slower to run.",
)
@click.option(
    "--static-groups", is_flag=True, help="Choose the scales of all groups before the first column is rounded."
)
@click.option(
    "--method",
    type=OneOf(("gptq", "rtn")),
    default="gptq",
    show_default=True,
    help="gptq, or rtn, which rounds to nearest and looks at no text.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    default=128,
    show_default=True,
    help="Number of pieces of the text to calibrate with.",
)
@click.option(
    "--seq-len", type=click.IntRange(8), metavar="N", help=f"Tokens in each piece of the text; default: {SEQ_LEN}."
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help=SEED)
@click.option(
    "--damp-percent",
    metavar="SHARE",
    default=0.01,
    show_default=True,
    help="How much to add to the diagonal of the Hessian, as a share of its mean.",
)
@click.option(
    "--mse/--no-mse",
    default=True,
    show_default=True,
    help="Search for the range of every group that leaves the smallest error.",
)
@click.option("--skip", multiple=True, metavar="GLOB", help=f"Leave such layers as they are. {GLOB}")
@click.option(
    "--checkpoint-format",
    type=OneOf(named("formats.quantized.containers", "Container")),
    default="gptq",
    show_default=True,
    help=CONTAINER,
)
@click.option(
    "--device",
    default="auto",
    shell_complete=some("auto", "cpu", "cuda"),
    show_default=True,
    metavar="DEVICE",
    help=DEVICE,
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Memory that may be used to save time, such as 8GB; default: half of what is free.",
)
@click.option("--html", type=FILE, help="Write a page for a browser, with the error of every layer.")
@write_here_options
def command(
    source: Path | str, out: Path | str, bits: str, html: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Quantise a model to 2, 3, 4 or 8 bits for each weight, with GPTQ.

    A quantised model takes a fraction of the memory. GPTQ runs some text, the calibration data, through the model, and
    chooses the integers with which the outputs of each layer change least. SOURCE is a model that transformers knows,
    with its tokenizer: a folder, hf://org/name[@revision] or a URL.

    \b
    Example:
      weightops quantize ./model --out ./model-4bit --calibration ./text.txt
      weightops quantize ./model --out ./model-3bit --bits 3 --act-order --calibration ./text.jsonl --html ./errors.html
      weightops quantize ./model --out ./model-rtn --method rtn --group-size 32
      weightops quantize ./model --out ./model-w4a16 --checkpoint-format compressed-tensors --calibration ./text.txt

    One block of the model is in memory at a time, so that no GPU and little memory are needed; an interrupted run
    continues at its block when the same command is given again. Linear layers are quantised, while embeddings, output
    head and norms stay as they are. transformers, vLLM, gptqmodel and auto-gptq read the result. The integers are those
    of GPTQ in awq and compressed-tensors, too: --checkpoint-format says how they are stored, not how they are found.
    """
    if options["method"] == "rtn":
        refuse_unused("with --method rtn, which looks at no text", *_OF_GPTQ)
    if options["dry_run"]:
        refuse_unused("with --dry-run, which finds no errors", "html")
    if html is not None:
        from weightops.io.atomic import check_target

        check_target(html)
    # Imported here because help and completion do without it.
    from weightops.cli.results import SKIPPED, show_result

    workers = options["workers"]
    with running(quiet) as control:
        done = weightops.quantize(source, out, bits=int(bits), control=control, **options)
    modules = done.modules
    if as_json:
        warn(done.result.warnings if done.result else ())
        print_json(done.to_json(workers))
    if done.result is None:
        if not as_json and not (done.skipped and quiet):
            say(f"{escape(str(out))}: {SKIPPED}" if done.skipped else _estimate_text(done))
        return
    if not as_json:
        show_result(done.result, False, quiet, workers)
        if not quiet:
            say(_text(modules, done.bits_per_weight))
    if html is not None:
        # Imported here because few want a page.
        from weightops.cli.pages.quantize import facts_of, page

        click.get_current_context().exit(save_report(html, page(Path(out).name, modules, facts_of(done))))


def _estimate_text(done: Quantization) -> str:
    found = done.estimate
    rows = [
        f"layers   {found.n_modules} in {found.n_blocks} blocks, {human(found.packed_nbytes)} when packed",
        f"memory   at most {human(found.memory_nbytes)}, and up to {human(found.kept_nbytes)} more to save time",
        f"disk     {human(2 * found.packed_nbytes + 2 * found.hidden_nbytes)} beside the output while it runs",
    ]
    return "\n".join(rows)


def _text(modules: Sequence[ModuleReport], bits: float) -> str:
    """By kind of layer: the error of the output, against rounding; then what was not as it should be."""
    kinds: dict[str, list[ModuleReport]] = defaultdict(list)
    for module in modules:
        kinds[module.kind].append(module)
    rows = [("layers", "number", "error", "worst", "of rounding", "damping")]
    for kind, found in kinds.items():
        errors = [m.error for m in found if m.error is not None]
        ratios = [ratio for m in found if (ratio := m.error_ratio) is not None]
        rows.append(
            (
                escape(kind),
                str(len(found)),
                percent(sum(errors) / len(errors)) if errors else "",
                percent(max(errors)) if errors else "",
                f"{sum(ratios) / len(ratios):.2f}" if ratios else "",
                f"{max(m.damp for m in found):.3g}",
            )
        )
    lines = [table(rows, right=range(1, 6)), f"{bits:.3f} bits per weight in {len(modules)} layers"]
    fallen = [m for m in modules if m.fallback]
    lines += [f"{escape(m.module)}: rounded to nearest: {m.fallback}" for m in fallen[:_SHOWN]]
    lines += [f"and {len(fallen) - _SHOWN} more (--json has all)"] if len(fallen) > _SHOWN else []
    return "\n".join(lines)
