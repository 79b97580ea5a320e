"""What check says of names and shapes against transformers' own class for a config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.architecture import Architecture, BeyondFiles, NotKnown, Shapes, find, older_names
from weightops.layouts.families import is_told_by_a_table, why_unknown
from weightops.operations.check.files import QUANTISED, is_wrapped
from weightops.operations.check.report import Finding

_MOST_SHAPES = 20
_NUMBER = re.compile(r"\d+")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")
_STACKED = {"gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The layers of an expert -> what holds those of all of them in transformers' modules."""


@dataclass(frozen=True)
class Held:
    """What names and shapes are held against: an architecture, a table of our own (`by`), or nothing, and why."""

    architecture: Architecture | None = None
    by: str | None = None
    reason: str = ""
    is_beyond_files: bool = False


def held_against(checkpoint: Checkpoint, config: Mapping[str, Any], cache: Path | None, *, wanted: bool) -> Held:
    """What a checkpoint is to be held against. `cache`: a folder for what was found; not `wanted`: our tables alone."""
    if is_told_by_a_table(checkpoint, config):
        return Held(by=f"{config['model_type']}, built in")
    if not checkpoint:
        return Held(reason="it holds no tensor")
    if not wanted:
        return Held(reason="it was not to be (--no-architecture)")
    if not config:
        return Held(reason="there is no config.json")
    layout = why_unknown(checkpoint, {**config, "model_type": "llama"})
    if layout.startswith("the layout"):
        return Held(reason=layout)
    quantised = config.get("quantization_config")
    if quantised and not (isinstance(quantised, dict) and isinstance(quantised.get("quant_method"), str)):
        return Held(reason="config.json has a quantization_config of no known method")
    if any(map(is_wrapped, checkpoint)):
        return Held(reason="names are those of a wrapper")
    try:
        found = find(config, checkpoint, cache)
    except NotKnown as error:
        return Held(reason=str(error), is_beyond_files=isinstance(error, BeyondFiles))
    return Held(found, by=f"{found.name} of {found.by}")


def architecture_findings(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    architecture: Architecture,
    may_have: Collection[str] = (),
    *,
    was_quantised: bool = False,
) -> Iterator[Finding]:
    """Tensors that the model has and the files lack, those that it does not have, and other shapes.

    That there are those of `may_have` is no finding, nor that experts lie apart in a model that is quantised by its
    config.json or `was_quantised`.
    """
    if not checkpoint:
        return
    prefix = _wrapping(checkpoint, architecture)
    if prefix:
        text = f"every name begins with {escape(prefix)}, and those of {architecture.name} do not"
        hint = f"transformers would make random weights; `weightops shard --drop-prefix {escape(prefix)}` renames them"
        yield Finding("error", "missing", next(iter(checkpoint)), text, hint)
        return
    quantised = {base for name in checkpoint for base in _stands_for(name)} if _may_be_quantised(config) else set()
    own = [name for name in checkpoint if not quantised or not QUANTISED.search(name)]
    # Files have the names that transformers writes, or those of its modules; which ones, most of them say.
    forms = [(form, _match(own, form, architecture.prefix)) for form in (architecture.stored, architecture.loaded)]
    form, known = max(forms, key=lambda pair: len(pair[1]))
    there = {*known, *quantised}
    there |= {name for group in architecture.tied for name in _spared(group, there, form)}
    missing = [n for n in form if n not in there and not _matches(n, architecture.may_lack)]
    taken = {*known.values(), *may_have}
    left = [n for n in own if n not in taken and not _matches(n, architecture.may_have)]
    if missing and left:
        apart = was_quantised or _may_be_quantised(config)
        target = _targets(checkpoint, config, architecture, [*missing, *left], experts_apart=apart)
        missing, left = _as_older(checkpoint, target, form, missing, left)
    if missing:
        count = f"{len(missing)} tensor{'s' * (len(missing) != 1)}"
        text = f"{count} of {architecture.name} {'are' if len(missing) > 1 else 'is'} missing: {listed(missing)}"
        hint = "is a file of the model missing? transformers makes random weights of it"
        yield Finding("error", "missing", missing[0], text, hint)
    if left:
        text = f"{len(left)} tensors are no part of {architecture.name}: {listed(left)}"
        yield Finding("warning", "unexpected", left[0], text, "transformers leaves them out")
    yield from _shape_findings(checkpoint, architecture, {n: s for n, s in known.items() if n not in quantised}, form)


def _spared(group: Collection[str], present: Collection[str], form: Shapes) -> list[str]:
    """Those of tied names that need not be there: all if one is, else all but the one that files have."""
    names = [name for name in group if name in form]
    return names if any(name in present for name in group) else names[1:]


def _shape_findings(
    checkpoint: Checkpoint, architecture: Architecture, known: Mapping[str, str], form: Shapes
) -> Iterator[Finding]:
    """Other shapes than the model's, once for all tensors of one kind that have the same wrong one."""
    wrong: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, source in known.items():
        found, expected = checkpoint[source].spec.shape, form[name]
        if found != expected:
            wrong.setdefault((_NUMBER.sub("*", source), found, expected), []).append(source)
    for (_, found, expected), names in list(wrong.items())[:_MOST_SHAPES]:
        more = f", and so are {len(names) - 1} more of its kind" if len(names) > 1 else ""
        text = f"{escape(names[0])} is {list(found)}, {architecture.name} by config.json has {list(expected)}{more}"
        yield Finding("error", "config-shape", names[0], text, "are config.json and the weights of one model?")


def _match(names: Collection[str], form: Shapes, prefix: str) -> dict[str, str]:
    """Name of the model -> name in the files, which may lack the first part or have it where the model does not."""
    found: dict[str, str] = {}
    for name in names:
        for known in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if known in form and known not in found:
                found[known] = name
                break
    return found


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _wrapping(checkpoint: Checkpoint, architecture: Architecture) -> str:
    """The first parts of all names, if without them most are the model's and with them none is; empty if not."""
    names, known = list(checkpoint), architecture.stored.keys() | architecture.loaded.keys()
    if _match(names, dict.fromkeys(known, ()), architecture.prefix):
        return ""
    parts = min(names, key=len).split(".")
    prefixes = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
    common = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]
    # Of "base_model.model." the second part may be the model's own.
    matched = {prefix: sum(name.removeprefix(prefix) in known for name in names) for prefix in common}
    best = max(matched, key=matched.__getitem__, default="")
    return best if best and 2 * matched[best] > len(names) else ""


def _may_be_quantised(config: Mapping[str, Any]) -> bool:
    return bool(config.get("quantization_config") or config.get("compression_config"))


def _stands_for(name: str) -> tuple[str, ...]:
    """Of a tensor that holds integers or scales, the names of the weight that it may be a part of."""
    found = QUANTISED.search(name)
    stem = name[: found.start()] if found else ""
    return (stem, f"{stem}.weight") if found else ()


def _targets(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    architecture: Architecture,
    names: Collection[str],
    *,
    experts_apart: bool,
) -> dict[str, str]:
    """What names are loaded into: as transformers knows older ones, and experts apart, as quantising leaves them."""
    found = older_names(config, checkpoint, names)
    for name in names if experts_apart else ():
        expert = _EXPERT.fullmatch(name)
        if expert is not None and name not in found:
            stacked = (f"{expert[1]}.{layer}" for layer in _STACKED[expert[2]])
            found[name] = next((known for known in stacked if known in architecture.loaded), name)
    return found


def _as_older(
    checkpoint: Checkpoint, target: Mapping[str, str], form: Shapes, missing: list[str], left: list[str]
) -> tuple[list[str], list[str]]:
    """What is missing and left once older names, and other ways to stack or split tensors, are taken for what they are.

    Names are paired that transformers loads into the same parameter: one by one, or all where they have as many
    elements.
    """
    lacking: dict[str, list[str]] = {}
    given: dict[str, list[str]] = {}
    for names, by_target in ((missing, lacking), (left, given)):
        for name in names:
            by_target.setdefault(target.get(name, name), []).append(name)
    explained: set[str] = set()
    for parameter, names in lacking.items():
        others = given.get(parameter, [])
        sizes = [math.prod(form[name]) for name in names], [checkpoint[name].spec.numel for name in others]
        if others and sum(sizes[0]) == sum(sizes[1]):
            explained.update(names, others)
            continue
        free = list(others)
        for name in names:
            like = (_NUMBER.findall(name), form[name])
            pair = next((o for o in free if (_NUMBER.findall(o), checkpoint[o].spec.shape) == like), None)
            if pair is not None:
                free.remove(pair)
                explained.update((name, pair))
    return [n for n in missing if n not in explained], [n for n in left if n not in explained]
