"""Fewer experts: those of a list, numbered anew, with their rows of the routers and what config.json says of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, SourceMissing, UsageError
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.experts import (
    COUNTS,
    GROUPS,
    GROUPS_USED,
    OF,
    PER_TOKEN,
    Block,
    group_count,
    parts_of,
    refuse_odd_counts,
    same_count,
    stated,
    with_numbers,
)
from weightops.layouts.renamed import with_modules
from weightops.lazy import LazyTensor
from weightops.operations.experts.use import By, ExpertUse, best
from weightops.ops.arrange import taken

Lists = Sequence[int] | Mapping[str, int | Sequence[int]]
"""Numbers of experts for all layers, or lists by the number of the layer, or by its full name where two towers have
that number; `of` beside these is how many experts they are chosen from."""
Keep = str | Lists
"""Which experts to keep: lists, `0,2,4-7` for all layers, or the path of a JSON file with lists or with scores."""

_RANGES = re.compile(r"\s*\d+\s*(-\s*\d+\s*)?(,\s*\d+\s*(-\s*\d+\s*)?)*", re.ASCII)
_MOST = 1 << 16
_DIGITS = 9


def parse_keep(keep: Keep, *, count: int | None = None, by: By | None = None, ungroup: bool = False) -> Lists:
    """Numbers of experts, for all layers or by layer.

    Of a file with scores (`ExpertUse`) they are the `count` best of each layer; see `best`. Raises `UsageError`, and
    `SourceMissing` for a file that is not there.
    """
    found = _read(keep) if isinstance(keep, str) else keep
    if isinstance(found, ExpertUse):
        if count is None:
            hint = "--count says how many of each layer are kept"
            raise UsageError(f"{escape(str(keep))}: says how experts are used, not which to keep", hint=hint)
        return best(found, count, by or "reap", ungroup=ungroup, where=escape(str(keep)))
    if count is not None or by is not None:
        hint = "`weightops eval --experts FILE` writes one"
        raise UsageError("--count and --by choose by a file of scores, and --keep is a list of experts", hint=hint)
    return found


def _read(keep: str) -> Lists | ExpertUse:
    if _RANGES.fullmatch(keep):
        found: list[int] = []
        for part in keep.split(","):
            first, _, last = (text.strip() for text in part.partition("-"))
            ends = (first, last or first)
            start, stop = (int(end) if len(end) <= _DIGITS else _MOST for end in ends)
            if stop < start or stop >= _MOST or len(found) + stop - start >= _MOST:
                raise UsageError(f"cannot read the experts {escape(part.strip())[:80]!r}", hint="write them as 0,2,4-7")
            found += range(start, stop + 1)
        return found
    path = Path(keep)
    if not path.is_file():
        hint = "numbers are written as 0,2,4-7; else it is the path of a JSON file"
        raise SourceMissing(f"{escape(keep)}: no such file, and no list of experts", hint=hint)
    where = escape(keep)
    try:
        text = path.read_bytes()
        document: Any = strict_json.load_object(text, where) if text.lstrip()[:1] == b"{" else msgspec.json.decode(text)
        if isinstance(document, dict) and "schema" in document:
            return msgspec.convert(document, ExpertUse)
        return msgspec.convert(document, list[int] | dict[str, int | list[int]])
    except (msgspec.MsgspecError, OSError, RecursionError, UnicodeDecodeError):
        hint = 'for example [0, 2, 3], or {"0": [0, 2, 3], "1": [1, 2, 5]}, or what `weightops eval --experts` writes'
        raise UsageError(f"{where}: expected a list of numbers, or one for each layer", hint=hint) from None


def kept(source: Checkpoint, blocks: list[Block], keep: Lists, *, ungroup: bool = False) -> Checkpoint:
    """The model with these experts of every layer, numbered anew in their order.

    Whatever has an entry for each expert follows: stacks, quantised ones too, rows and biases of routers, and every
    spelling of the count in config.json. Experts that all tokens take are left alone.

    Raises `UsageError` for numbers that are not there, lists of different lengths, layers without one, fewer experts
    than a token takes; and where a router chooses among groups, unless every group keeps as many: with `ungroup`
    config.json says that there is one group, which changes what the router chooses.
    """
    where, config = escape(source.name), source.config()
    refuse_odd_counts(source)
    _check_routers(source, blocks, where)
    count = same_count(blocks, where)
    lists = _lists(blocks, keep, count, where)
    left = len(next(iter(lists.values())))
    _check_per_token(config, left, where)
    config, notes = _regrouped(config, lists, count, ungroup, where)
    renamed: dict[str, str] = {}
    tensors: dict[str, LazyTensor] = {}
    owner = {name: block for block in blocks for name in _names(block)}
    new_names = {name: new for block in blocks for name, new in _renumbered(block, lists[block.prefix]).items()}
    for name, tensor in source.items():
        block = owner.get(name)
        if block is None:
            tensors[name] = tensor
        elif name in block.routed:
            tensors[name] = taken(tensor, block.routed[name], lists[block.prefix])
        elif name in new_names:
            tensors[new_names[name]] = tensor
            renamed[name] = new_names[name]
        elif name in block.stacks.values():
            tensors[name] = taken(tensor, 0, lists[block.prefix])
    gone = len([n for b in blocks for n in b.apart]) - sum(len(lists[b.prefix]) for b in blocks if b.apart)
    lost = [name for block in blocks for n in block.apart for name in block.apart[n].values() if name not in renamed]
    edited = with_modules(with_numbers(config, dict.fromkeys(COUNTS, left)), renamed, lost)
    result = source.with_tensors(tensors).with_config(lambda _: edited)
    if not stated(config, COUNTS):
        notes.append(f"{where}: no config.json says how many experts there are; who reads it must be told {left}")
    if any(part.get("norm_topk_prob") is False for part in parts_of(config)):
        notes.append(
            f"{where}: norm_topk_prob is false: what the experts left out weighed in a token is not shared out among "
            "those that are kept"
        )
    said = f"experts: {left} of {count} kept in {len(blocks)} layers"
    return result.did(f"{said}; {gone} left out" if gone else said).warned(*notes)


def _check_routers(source: Checkpoint, blocks: list[Block], where: str) -> None:
    """Raise `CorruptInput` for experts without a router that is known, whose rows would stay as they are."""
    for block in blocks:
        if not any(len(source[name].spec.shape) == 2 for name in block.routed):
            raise CorruptInput(
                f"{where}: {escape(block.prefix.rstrip('.'))} has experts, and no router that is known by its name",
                hint="known are gate, router and router.layer; is a file of the model missing?",
            )


def _names(block: Block) -> list[str]:
    apart = (name for tensors in block.apart.values() for name in tensors.values())
    return [*block.stacks.values(), *block.routed, *apart]


def _renumbered(block: Block, chosen: Sequence[int]) -> dict[str, str]:
    """New names by old ones, of experts that are apart and kept."""
    return {
        name: f"{block.prefix}experts.{new}.{rest}"
        for new, old in enumerate(chosen)
        for rest, name in block.apart.get(old, {}).items()
    }


def _lists(blocks: list[Block], keep: Lists, count: int, where: str) -> dict[str, list[int]]:
    """By block, the experts in their order."""
    if isinstance(keep, Mapping):
        of = keep.get(OF, count)
        if of != count:
            raise UsageError(
                f"{where}: has {count} experts in each layer, and what to keep is chosen from {of}",
                hint="are the list and the model of one mixture?",
            )
        by_layer = {layer: chosen for layer, chosen in keep.items() if not isinstance(chosen, int)}
        single = next(iter(keep.keys() - by_layer.keys() - {OF}), None)
        if single is not None:
            raise UsageError(f"{where}: expected a list of experts for layer {escape(single)}, found a number")
        numbers = {str(block.number) for block in blocks}
        odd = sorted(by_layer.keys() - numbers - {_layer(block) for block in blocks})
        if odd:
            raise UsageError(
                f"{where}: layer {escape(odd[0])} has no experts", hint=f"layers with are {listed(numbers)}"
            )
    found: dict[str, list[int]] = {}
    for block in blocks:
        shown = escape(block.prefix.rstrip("."))
        chosen = _list_of(block, by_layer, blocks, where) if isinstance(keep, Mapping) else keep
        if chosen is None:
            raise UsageError(
                f"{where}: there is no list of experts for layer {block.number} ({shown})",
                hint="all layers keep as many, those that predict further tokens too; `part --drop mtp` drops these",
            )
        twice = [number for number, times in Counter(chosen).items() if times > 1]
        beyond = [number for number in chosen if not 0 <= number < count]
        if twice or beyond or not chosen:
            what = f"expert {twice[0]} is named twice" if twice else f"there is no expert {beyond[0]}" if beyond else ""
            hint = f"there are {count}, 0 to {count - 1}"
            raise UsageError(f"{where}: {shown}: {what or 'no expert would be left'}", hint=hint)
        found[block.prefix] = sorted(chosen)
    lengths = {prefix: len(chosen) for prefix, chosen in found.items()}
    if len(set(lengths.values())) > 1:
        (one, fewest), (other, most) = (f(lengths.items(), key=lambda item: item[1]) for f in (min, max))
        raise UsageError(
            f"{where}: {escape(one)} would keep {fewest} experts and {escape(other)} {most}, which no config.json says",
            hint="keep as many in every layer",
        )
    return found


def _layer(block: Block) -> str:
    return block.layer.rstrip(".")


def _list_of(block: Block, keep: Mapping[str, Sequence[int]], blocks: list[Block], where: str) -> Sequence[int] | None:
    """What a layer keeps, by its full name or its number; raises `UsageError` for the number of several layers."""
    if _layer(block) in keep:
        return keep[_layer(block)]
    chosen = keep.get(str(block.number))
    others = [_layer(each) for each in blocks if each.number == block.number and _layer(each) not in keep]
    if chosen is not None and len(others) > 1:
        raise UsageError(
            f"{where}: {block.number} is the number of {' and of '.join(map(escape, others))}",
            hint=f'name each in full: {{"{escape(others[-1])}": [0, 1]}}',
        )
    return chosen


def _check_per_token(config: Mapping[str, Any], left: int, where: str) -> None:
    for key, number in stated(config, PER_TOKEN).items():
        if number > left:
            raise UsageError(
                f"{where}: a token takes {number} experts ({key}), and {left} would be left",
                hint=f"keep more, or lower it too: --per-token {left}",
            )


def _regrouped(
    config: dict[str, Any], lists: Mapping[str, Sequence[int]], count: int, ungroup: bool, where: str
) -> tuple[dict[str, Any], list[str]]:
    """config.json for routers that choose among groups of experts, and what there is to say of it."""
    groups = group_count(config)
    if groups <= 1:
        return config, []
    if ungroup:
        note = f"config.json: {GROUPS} and {GROUPS_USED} are 1 now: routers choose among all experts, not by groups"
        return with_numbers(config, {GROUPS: 1, GROUPS_USED: 1}), [note]
    if count % groups:
        raise UsageError(f"{where}/config.json: {GROUPS} is {groups}, which does not divide {count} experts")
    size = count // groups
    for prefix, chosen in lists.items():
        left = Counter(number // size for number in chosen)
        per_group = {left[group] for group in range(groups)}
        if len(per_group) > 1 or min(per_group) < 2:
            shown = ", ".join(str(left[group]) for group in range(groups))
            raise UsageError(
                f"{where}: {escape(prefix.rstrip('.'))} chooses among {groups} groups of {size} experts, which would "
                f"keep {shown}",
                hint="keep the same number in every group, two at least; or --ungroup, which changes the routing",
            )
    return config, []
