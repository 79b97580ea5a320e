"""What writing commands say of their results."""

from __future__ import annotations

from collections.abc import Mapping

import click

from weightops.cli.meter import human
from weightops.cli.output import print_json, table, warn
from weightops.engine.limits import peak_memory
from weightops.engine.preflight import default_workers, free_disk
from weightops.engine.proof import fetched_nbytes
from weightops.io.escape import escape
from weightops.ops.measures.loss import Loss
from weightops.recipes.execute import Result
from weightops.recipes.report import write_json

_SHOWN_LOSSES = 5


def show_result(result: Result, as_json: bool, quiet: bool, workers: int | None) -> None:
    """What a writing command says when it is done, or with --dry-run would do."""
    warn(result.warnings)
    if as_json:
        print_json(write_json(result, workers))
    elif result.manifest is None:
        click.echo(_dry_run_text(result, workers))
    elif not quiet:
        nbytes, count = result.plan.total_nbytes, len(result.plan.shards)
        kept = f", {len(result.resumed)} kept from before" if result.resumed else ""
        click.echo(
            f"{escape(str(result.out))}: {len(result.manifest.tensors)} tensors, {human(nbytes)} in {count} files{kept}"
        )
        if result.manifest.losses:
            click.echo(_loss_text(result.manifest.losses))
        energies = {name: note for name, note in result.manifest.notes.items() if "energy" in note}
        if energies:
            click.echo(_energy_text(energies))
        click.echo(f"content {result.manifest.content_id}")


def _loss_text(losses: Mapping[str, Loss]) -> str:
    """What the casts lost: the sum, and the tensors with the gravest losses."""
    worst = sorted(losses.items(), key=lambda item: (-item[1].too_large, -item[1].flushed, -item[1].changed))
    rows: list[tuple[str, ...]] = []
    for name, loss in [("all tensors", sum(losses.values(), Loss())), *worst[:_SHOWN_LOSSES]]:
        counts = (loss.overflowed, loss.saturated, loss.flushed, loss.subnormal, loss.nan)
        share = f"{100 * loss.changed / max(1, loss.elements):.3g} %"
        rows.append((escape(name), share, *map(str, counts), f"{loss.max_relative_error:.2g}"))
    heads = ("cast", "changed", "to infinity", "clamped", "to zero", "subnormal", "NaN before", "largest error")
    return table([heads, *rows], right=range(1, 8))


def _energy_text(notes: Mapping[str, Mapping[str, float]]) -> str:
    """How much of each change an adapter's rank has captured: the mean, and the modules with least."""
    least = sorted(notes.items(), key=lambda item: item[1]["energy"])
    rows = [("module", "rank", "captured", "change")]
    rows += [
        (escape(n), f"{note['rank']:.0f}", f"{100 * note['energy']:.4g} %", f"{100 * note.get('change', 0):.3g} %")
        for n, note in least[:_SHOWN_LOSSES]
    ]
    mean = sum(note["energy"] for note in notes.values()) / len(notes)
    return f"{table(rows, right=(1, 2, 3))}\n{len(notes)} modules, {100 * mean:.4g} % captured on average"


def _dry_run_text(result: Result, workers: int | None) -> str:
    plan = result.plan
    rows = [("file", "tensors", "size")]
    rows += [(s.name, str(len(s.tensors)), human(plan.shard_nbytes[s.name])) for s in plan.shards]
    rows += [("total", str(sum(1 for _ in plan.tensors)), human(plan.total_nbytes))]
    memory = peak_memory([plan], workers or default_workers([plan]))
    fetched = fetched_nbytes(plan)
    network = f", {human(fetched)} over the network" if fetched else ""
    return "\n".join(
        [
            table(rows, right=(1, 2)),
            "",
            f"reads    {human(sum(f.nbytes for f in plan.sources))} from {len(plan.sources)} files{network}",
            f"memory   at most {human(memory)}",
            f"disk     {human(plan.total_nbytes)} of {human(free_disk(result.out))} free",
            f"others   {', '.join(map(escape, sorted(plan.sidecars))) or 'none'}",
        ]
    )
