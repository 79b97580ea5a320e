"""GGUF models in several files, as `llama-gguf-split` writes them: `NAME-00001-of-00003.gguf`.

Each file has a header of its own. The first has the model's metadata, all say which part they are (`split.no`, from 0),
of how many (`split.count`), and how many tensors there are in all (`split.tensors.count`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weightops.errors import CorruptInput
from weightops.formats.gguf.metadata import number
from weightops.io.escape import escape

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_NO, _COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_MAX_PARTS = 1000
_ALIGNMENT = 32


def part_names(name: str, metadata: Mapping[str, Any]) -> list[str]:
    """The names of all parts of the model of which the file `name` is one; that name alone where it is whole.

    Raises `CorruptInput` for a part that is not named as parts are, so that the others cannot be found.
    """
    count = number(metadata, _COUNT) or 0
    if count < 2:
        return [name]
    names = named_parts(name)
    if len(names) != count:
        part = (number(metadata, _NO) or 0) + 1
        raise CorruptInput(
            f"{escape(name)}: is part {part} of {count} of a model, and its name does not say so",
            hint=f"parts are found by their names: call it NAME-{part:05d}-of-{count:05d}.gguf, and the others alike",
        )
    return names


def named_parts(name: str) -> list[str]:
    """The names of all parts where `name` is that of one; that name alone where it is not."""
    matched = _NAME.fullmatch(name)
    count = int(matched["count"]) if matched else 1
    if matched is None or not 1 <= int(matched["number"]) <= count or count > _MAX_PARTS:
        return [name]
    return [named(matched["stem"], i, count) for i in range(1, count + 1)]


def named(stem: str, number: int, count: int) -> str:
    """The name of a part; the first has number 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def divided(sizes: Sequence[tuple[str, int]], max_nbytes: int) -> list[list[str]]:
    """Tensors, each a name and its bytes, in parts by llama-gguf-split's rule: in order, headers not counted.

    A tensor above the limit gets a part of its own, where that program gives up.
    """
    parts: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes:
        padded = nbytes + -nbytes % _ALIGNMENT
        if parts[-1] and filled + padded > max_nbytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += padded
    return parts


def part_metadata(name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the file `name`, from that of the model: the first of several parts has it all.

    What says how many tensors the parts have in all is there if there are several.
    """
    if TENSORS not in metadata:
        return dict(metadata)
    names = named_parts(name)
    i = names.index(name)
    own = {_NO: {"uint16": i}, TENSORS: metadata[TENSORS], _COUNT: {"uint16": len(names)}}
    rest = {key: value for key, value in metadata.items() if key != TENSORS} if i == 0 else {}
    return {**rest, **own}


def joined_metadata(names: Sequence[str], parts: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """The metadata of a model, from that of its files and how many tensors each has; without what is said of parts.

    Raises `CorruptInput` where the files are not the parts of one model, all of them and in their order.
    """
    first = parts[0][0]
    if all((number(metadata, _COUNT) or 0) < 2 for metadata, _ in parts):  # whole files, whatever their names
        return {k: v for metadata, _ in reversed(parts) for k, v in metadata.items() if not k.startswith("split.")}
    total, stated = sum(count for _, count in parts), number(first, TENSORS)
    for i, (name, (metadata, _)) in enumerate(zip(names, parts, strict=True)):
        said = tuple(number(metadata, key) for key in (_NO, _COUNT, TENSORS))
        if said != (i, len(parts), stated):
            no, count, tensors = said
            raise CorruptInput(
                f"{escape(name)}: is no part of the model that {escape(names[0])} begins: it says part "
                f"{'?' if no is None else no + 1} of {count or '?'}, of {tensors or '?'} tensors in all; expected part "
                f"{i + 1} of {len(parts)}, of {stated or '?'}",
                hint="download the parts of one model again, into a folder of their own",
            )
    if total != stated:
        raise CorruptInput(
            f"{escape(names[0])}: the {len(parts)} parts hold {total} tensors, expected {stated or '?'} as each says",
            hint="one of them is of another model",
        )
    return {key: value for key, value in first.items() if not key.startswith("split.")}
