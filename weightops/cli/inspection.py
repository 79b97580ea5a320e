"""What inspect says, as text: an inventory, the tree of modules, statistics of tensors, and what an adapter does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from textwrap import fill
from typing import TYPE_CHECKING

from weightops.cli.meter import human
from weightops.cli.output import table
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.engine.examine import TensorReport
    from weightops.operations.inspect import AdapterReport, Inspection, Node, Target
    from weightops.ops.measures.statistics import TensorStatistics
    from weightops.spec import TensorSpec

_LEAST = 20
"""Characters that a name keeps, however narrow the terminal is."""
STATISTICS = ("mean", "std", "min", "max", "zero", "NaN", "inf")
_SHOWN = 20
"""Singular values that a line has room for, as bars."""
_BARS = "▁▂▃▄▅▆▇█"


def inventory(found: Inspection, width: int | None = None) -> str:
    """What it is, how large, and how it was made."""
    dtypes = ", ".join(f"{dtype} {human(nbytes)}" for dtype, nbytes in found.by_dtype().items())
    lines = [
        f"{escape(found.path)}: {found.kind}" + (f", {escape(found.model_type)}" if found.model_type else ""),
        f"{len(found.tensors)} tensors, {found.parameters:,} parameters, {human(found.nbytes)} ({dtypes})",
    ]
    lines += [f"quantised: {count} weights as {scheme}" for scheme, count in found.quantised.schemes.items()]
    if found.content_id:
        lines.append(f"content {found.content_id} (from its manifest)")
    lines += ["", "made by", *(f"  {escape(line)}" for line in found.history)] if found.history else []
    return wrapped(lines, width)


def files(found: Inspection) -> str:
    """The weight files."""
    rows = [("file", "tensors", "size")]
    rows += [(escape(n), str(count), human(nbytes)) for n, (count, nbytes) in found.by_shard().items()]
    return table(rows, right=(1, 2))


def beside(found: Inspection, width: int | None = None) -> str:
    """Tensors that share bytes, and the other files."""
    lines = [f"{escape(alias)} shares the bytes of {escape(name)}" for alias, name in found.aliases.items()]
    if found.sidecars:
        lines += [*([""] if lines else []), f"beside the weights: {', '.join(map(escape, found.sidecars))}"]
    return wrapped(lines, width)


def tensors(found: Inspection, width: int | None, *, stats: bool) -> str:
    """Every tensor, with its statistics where values were read."""
    if not stats:
        rows = [("tensor", "dtype", "shape")]
        rows += [(escape(n), s.dtype.value, str(list(s.shape))) for n, s in found.tensors.items()]
        return fitted(rows, width)
    lines = [(escape(name), report.spec, report.statistics) for name, report in found.reports.items()]
    return _with_statistics("tensor", lines, width)


def tree(found: Inspection, depth: int | None, width: int | None, *, stats: bool) -> str:
    """The modules, those that are alike once; with statistics of all that a line stands for where values were read."""
    nodes = [row for top in found.tree for row in top.walk(depth)]
    labels = [f"{'  ' * level}{_label(node)}" for level, node in nodes]
    if stats:
        known = (_joined(found.reports, node.members) for _, node in nodes)
        lines = [(label, node.spec, each) for label, (_, node), each in zip(labels, nodes, known, strict=True)]
        return _with_statistics("module", lines, width)
    cut = {id(node) for level, node in nodes if depth is not None and level + 1 == depth and node.children}

    def rows(what: Callable[[TensorSpec], str]) -> list[Sequence[str]]:
        table: list[Sequence[str]] = [("module", "tensors", "parameters", "size", "share")]
        for label, (_, node) in zip(labels, nodes, strict=True):
            held = what(node.spec) if node.spec else f"{len(node.members)} tensors" if id(node) in cut else ""
            share = f"{100 * node.nbytes / found.nbytes:.1f} %" if found.nbytes else ""
            table.append((label, held, count(node.parameters), human(node.nbytes), share))
        return table

    wide = rows(lambda spec: f"{spec.dtype.value} {list(spec.shape)}")
    needed = sum(max(map(len, column)) + 2 for column in zip(*wide, strict=True)) - 2
    if width is None or needed <= width:
        return fitted(wide, width, right=(2, 3, 4))
    return fitted(rows(lambda spec: f"{spec.dtype.name} {list(spec.shape)}"), width, right=(2, 3, 4))


def _label(node: Node) -> str:
    only = f" (in {' of '.join(node.only)})" if node.only else ""
    return f"{escape(node.label)}{only}"


def _joined(reports: Mapping[str, TensorReport], names: Iterable[str]) -> TensorStatistics | None:
    """The statistics of tensors as if they were one; None where there are none of some of them."""
    found = [reports[name].statistics for name in names]
    known = [each for each in found if each is not None]
    return reduce(lambda one, other: one + other, known) if known and len(known) == len(found) else None


def _with_statistics(
    head: str, lines: Iterable[tuple[str, TensorSpec | None, TensorStatistics | None]], width: int | None
) -> str:
    rows: list[Sequence[str]] = [(head, *STATISTICS)]
    rows += [(label, *statistics_cells(found)) for label, _, found in lines]
    return fitted(rows, width, right=range(1, len(STATISTICS) + 1))


def not_examined(found: Inspection) -> str:
    """Of which tensors values were read and are no numbers of whole bytes, in a sentence."""
    dtypes = Counter(report.spec.dtype.value for report in found.reports.values() if report.statistics is None)
    if not dtypes:
        return ""
    counts = ", ".join(f"{number} tensors of {dtype}" for dtype, number in dtypes.items())
    return f"without statistics, because their numbers share bytes or are complex: {counts}"


def statistics_cells(found: TensorStatistics | None) -> tuple[str, ...]:
    """Mean, deviation, extremes and counts, for people; of a dtype that has none nothing."""
    if found is None:
        return ("",) * len(STATISTICS)
    numbers = (found.mean, found.std, found.minimum, found.maximum)
    shown = tuple("" if number is None else f"{number:.3g}" for number in numbers)
    zeros = f"{100 * found.zero / found.elements:.3g} %" if found.zero else "0"
    return (*shown, zeros, str(found.nan), str(found.infinite))


def adapter(report: AdapterReport, width: int | None) -> str:
    """What an adapter targets, and how large what it adds is."""
    kind = "DoRA" if report.dora else "LoRA"
    scaled = "lora_alpha / sqrt(r)" if report.rank_stabilised else "lora_alpha / r"
    lines = [f"{kind}: r {report.rank}, lora_alpha {report.alpha:g}, scale {scaled}"]
    if report.target_modules:
        lines.append(f"targets {', '.join(map(escape, report.target_modules))}")
    if report.modules_to_save:
        lines.append(f"keeps whole {', '.join(map(escape, report.modules_to_save))}")
    if report.base_model:
        lines.append(f"trained on {escape(report.base_model)}, says its config")
    lines = [wrapped(lines, width)]
    measured = [target for target in report.targets if target.change is not None and target.change.norm is not None]
    heads = ("target", "shape", "r", "alpha", "scale", *(("norm", "r99", "stable", "spectrum") if measured else ()))
    rows: list[Sequence[str]] = [heads]
    rows += [(*_target_cells(target), *(_change_cells(target) if measured else ())) for target in report.targets]
    lines += ["", fitted(rows, width, right=range(1, 8))] if report.targets else []
    if report.whole:
        rows = [("held whole", "shape")]
        rows += [(escape(each.tensor), f"{list(each.shape)}{' rows' if each.rows else ''}") for each in report.whole]
        lines += ["", fitted(rows, width)]
    if measured:
        norm = sum((target.change.norm or 0) ** 2 for target in measured if target.change) ** 0.5
        lines += ["", f"norm, rank and spectrum are those of scale * B A{_magnitude(report)}; norm of all: {norm:.4g}"]
    if report.base is not None:
        lines += ["", _fit(report)]
    return "\n".join(lines)


def _magnitude(report: AdapterReport) -> str:
    return ", before DoRA's magnitudes" if report.dora else ""


def _fit(report: AdapterReport) -> str:
    """Whether the base is the right one, in a sentence."""
    parts, wrong = len(report.targets) + len(report.whole), len(report.problems)
    base = escape(report.base or "")
    if not wrong:
        return f"fits {base}: each of {parts} parts has its place there, by name and shape"
    return f"does not fit {base}: of {parts} parts {wrong} without a place there"


def _target_cells(target: Target) -> tuple[str, ...]:
    experts = f"{target.experts} x " if target.experts > 1 else ""
    name = f"{escape(target.module)}{' (embedding)' if target.embedding else ''}"
    return (name, f"{experts}{list(target.shape)}", str(target.rank), f"{target.alpha:g}", f"{target.scale:.4g}")


def _change_cells(target: Target) -> tuple[str, ...]:
    change = target.change
    if change is None or change.norm is None or not change.singular_values:
        return ("", "", "", "")
    stable = "" if change.stable_rank is None else f"{change.stable_rank:.1f}"
    return (f"{change.norm:.3g}", str(change.r99 or ""), stable, _bars(change.singular_values))


def _bars(values: Sequence[float]) -> str:
    """Numbers from the largest down, as a row of bars; each the largest of those that it stands for."""
    step = -(-len(values) // _SHOWN)
    top = values[0] or 1.0
    return "".join(_BARS[min(7, int(8 * value / top))] for value in values[::step])


def count(number: int) -> str:
    """A number of parameters, for reading: `1.10 B`, `67.1 M`."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * size:  # which three digits round up
            return f"{number / size:.0f} {unit}" if number >= 999.5 * size else f"{number / size:.3g} {unit}"
    return str(number)


def fitted(rows: Sequence[Sequence[str]], width: int | None, right: Sequence[int] = ()) -> str:
    """A table no wider than `width`, with names in the first column that are shortened where they must be."""
    if width is not None:
        others = sum(max(len(row[i]) for row in rows) + 2 for i in range(1, len(rows[0])))
        room = max(_LEAST, width - others)
        rows = [(shortened(row[0], room), *row[1:]) for row in rows]
    return table(rows, right=right)


def wrapped(lines: Sequence[str], width: int | None) -> str:
    """Lines of prose, those that are too long on several."""
    if width is None:
        return "\n".join(lines)
    wrap = partial(fill, width=width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap(line) if len(line) > width else line for line in lines)


def shortened(text: str, room: int) -> str:
    """A name in so many characters: its first parts go, as far as the number of a layer, and then its middle.

    The indentation stays.
    """
    if len(text) <= room:
        return text
    name = text.lstrip()
    indent, parts = text[: len(text) - len(name)], name.split(".")
    while len(parts) > 2 and not parts[0].isdecimal() and len(indent) + len(name) > room:
        del parts[0]
        name = f"…{'.'.join(parts)}"
    left = room - len(indent)
    if len(name) > left:
        head = max(1, (left - 1) // 3)
        name = f"{name[:head]}…{name[len(name) - max(0, left - head - 1) :]}"
    return f"{indent}{name}"
