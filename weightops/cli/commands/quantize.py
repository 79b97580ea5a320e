"""weightops quantize"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from weightops import api
from weightops.cli.options import (
    SOURCE,
    WRITE_CODES,
    epilog,
    refuse_unused,
    result_document,
    show_result,
    write_options,
)
from weightops.cli.output import print_json, running, save_report, table, warn
from weightops.cli.progress import human, percent
from weightops.io.atomic import check_target
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.quantization.options import ModuleReport

_SHOWN = 5
_OF_GPTQ = ("act_order", "static_groups", "calibration", "samples", "seq_len", "seed", "damp_percent")


@click.command("quantize", epilog=epilog(WRITE_CODES))
@click.argument("source", type=SOURCE)
@click.option("--bits", type=click.Choice(("2", "3", "4", "8")), default="4", show_default=True, help="Per weight.")
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs that share a scale; -1 for all.")
@click.option("--sym/--asym", default=True, show_default=True, help="Grids around zero, or with zero points.")
@click.option("--act-order", is_flag=True, help="Solve columns by falling activation; slower to read (g_idx).")
@click.option("--static-groups", is_flag=True, help="Choose all grids before the first column is solved.")
@click.option("--method", type=click.Choice(("gptq", "rtn")), default="gptq", show_default=True, help="Or just round.")
@click.option(
    "--calibration", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Text or JSONL; repeatable."
)
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Windows of calibration text.")
@click.option("--seq-len", type=click.IntRange(8), metavar="N", help="Tokens of a window; default: 2048 at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which windows are drawn.")
@click.option("--damp-percent", default=0.01, show_default=True, help="Of the Hessian's mean diagonal, added to it.")
@click.option("--mse/--no-mse", default=True, show_default=True, help="Search every grid's best clipping.")
@click.option("--skip", multiple=True, metavar="GLOB", help="Leave such layers as they are; repeatable.")
@click.option(
    "--checkpoint-format",
    type=click.Choice(("gptq", "gptq_v2")),
    default="gptq",
    show_default=True,
    help="v1 is read by everything; v2 allows zero points of 0.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--max-memory", metavar="SIZE", help="What is left of it saves time: 8GB; default: half of what is free.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with a heat map of errors.")
@write_options
def command(
    source: Path | str, out: Path, bits: str, html: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Quantise the linear layers of a model to 2, 3, 4 or 8 bits with GPTQ, one block in memory at a time.

    SOURCE is a folder, hf://org/name[@revision] or a URL. Calibration text runs through the model block by block; each
    layer is solved so that its output changes least. The result is in the GPTQ format that transformers, vLLM,
    gptqmodel and auto-gptq read. Embeddings, head and norms stay as they are. A run that was killed continues at its
    block when the same command is given again.

    \b
    Example:
      weightops quantize ./model --out ./model-4bit --calibration ./text.txt
      weightops quantize ./model --out ./model-3bit --bits 3 --act-order --calibration ./text.jsonl --html ./errors.html
      weightops quantize ./model --out ./model-rtn --method rtn --group-size 32
    """
    if options["method"] == "rtn":
        refuse_unused("with --method rtn, which looks at no text", *_OF_GPTQ)
    if options["dry_run"]:
        refuse_unused("with --dry-run, which finds no errors", "html")
    if html is not None:
        check_target(html)
    workers = options["workers"]
    with running(quiet) as control:
        done = api.quantize(source, out, bits=int(bits), control=control, **options)
    modules = done.modules
    if done.result is None:
        _show_estimate(done, as_json)
        return
    if as_json:
        document = result_document(done.result, workers)
        warn(done.result.warnings)
        print_json(document | {"bits_per_weight": done.bits_per_weight, "modules": msgspec.to_builtins(modules)})
    else:
        show_result(done.result, False, quiet, workers)
        if not quiet:
            click.echo(_text(modules, done.bits_per_weight))
    if html is not None:
        # Imported here because few want a page.
        from weightops.cli.pages.quantize import facts_of, page

        click.get_current_context().exit(save_report(html, page(out.name, modules, facts_of(done))))


def _show_estimate(done: api.Quantization, as_json: bool) -> None:
    found = done.estimate
    if as_json:
        print_json({"schema": "weightops-write/1", "written": False, **vars(found)})
        return
    rows = [
        f"layers   {found.n_modules} in {found.n_blocks} blocks, {human(found.packed_nbytes)} when packed",
        f"memory   at most {human(found.memory_nbytes)}, and up to {human(found.kept_nbytes)} more to save time",
        f"disk     {human(2 * found.packed_nbytes + 2 * found.hidden_nbytes)} beside the output while it runs",
    ]
    click.echo("\n".join(rows))


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
