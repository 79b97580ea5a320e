"""Rotary settings of config.json: what transformers cannot use or would take otherwise, and how both of its dialects
say them. Before 5 these are `rope_theta` and `rope_scaling`, since then `rope_parameters`.

Source: transformers 5.23, modeling_rope_utils.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.layouts.layer_config import TEXT_CONFIGS

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""What each kind of scaling needs. Others are of single models, and are left to them."""
_KINDS = (*_NEEDED, "su", "mrope", "proportional", "axial")
_SPELLINGS = {"su": "longrope"}
_ORIGINAL = "original_max_position_embeddings"
_NUMBERS = (_ORIGINAL, "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow")
"""What has to be a number above zero where it is said."""
_OTHERS: tuple[str, ...] = (
    *("theta", "type", "factor", "rope_type", "rope_theta", "partial_rotary_factor", "short_factor", "long_factor"),
    *("short_mscale", "long_mscale", "mscale", "mscale_all_dim", "truncate", "mrope_section", "mrope_interleaved"),
    *("alpha", "finetuned"),
)
"""What else rotary settings hold in transformers' models."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with rotary settings, in a sentence, and what to do about it."""

    severity: Literal["error", "warning"]
    message: str
    hint: str


def rope_problems(config: Mapping[str, Any], inside: str = "") -> Iterator[Problem]:
    """What is wrong with the rotary settings of config.json, in every part of it that has some."""
    for key in TEXT_CONFIGS:
        if isinstance(config.get(key), dict):
            yield from rope_problems(config[key], f"{key}.")
    dialects: dict[str, dict[str, Any]] = {
        k: config[k] for k in ("rope_scaling", "rope_parameters") if isinstance(config.get(k), dict)
    }
    for key, value in dialects.items():
        by_layer = [(f"{key}.{kind}", own) for kind, own in value.items() if isinstance(own, dict)]
        for name, settings in by_layer or [(key, value)]:
            yield from _problems(config, settings, f"config.json: {inside}{name}")
    old, new = dialects.get("rope_scaling"), dialects.get("rope_parameters")
    if old and new and "rope_type" in new and _kind(old) != _kind(new):
        yield Problem(
            "error",
            f"config.json: {inside}rope_scaling is {escape(_kind(old))}, rope_parameters is {escape(_kind(new))}",
            "transformers before 5 reads the first, since then the second: let both say the same",
        )
    theta, own = config.get("rope_theta"), (new or {}).get("rope_theta")
    if theta is not None and own is not None and theta != own:
        yield Problem(
            "error",
            f"config.json: {inside}rope_theta is {escape(str(theta))[:40]}, in rope_parameters {escape(str(own))[:40]}",
            "transformers before 5 reads the first, since then the second: let both say the same",
        )


def _kind(settings: Mapping[str, Any]) -> str:
    found = str(settings.get("rope_type", settings.get("type", "default")))
    return _SPELLINGS.get(found, found)


def _problems(config: Mapping[str, Any], own: Mapping[str, Any], where: str) -> Iterator[Problem]:
    kind = _kind(own)
    if kind not in _KINDS:
        known = ", ".join(_NEEDED)
        yield Problem("error", f"{where}: rope_type {escape(kind)[:60]} is not known", f"transformers has {known}")
        return
    for key in _NEEDED.get(kind, ()):
        if own.get(key) is None and not (key == _ORIGINAL and config.get(_ORIGINAL) is not None):
            hint = "the model does not load" if kind != "yarn" else "by how much the trained context is stretched"
            yield Problem("error", f"{where}: {kind} lacks {key}", hint)
    factor, theta = own.get("factor"), own.get("rope_theta")
    for key, value, least in (("factor", factor, 1.0), ("rope_theta", theta, 0.0)):
        if value is not None and (not _is_number(value) or value < least or value == 0):
            expected = "a number of at least 1" if least else "a number above zero"
            yield Problem("error", f"{where}: {key} is {escape(repr(value))[:60]}, expected {expected}", "a misprint?")
    for key in _NUMBERS:
        value = own.get(key)
        if value is not None and not (_is_number(value) and value > 0):
            text = f"{where}: {key} is {escape(repr(value))[:60]}, expected a number above zero"
            yield Problem("error", text, "a misprint?")
    low, high = own.get("low_freq_factor"), own.get("high_freq_factor")
    if kind == "llama3" and _is_number(low) and _is_number(high) and low >= high:
        text = f"{where}: low_freq_factor is {low:g}, expected less than high_freq_factor, {high:g}"
        yield Problem("error", text, "are the two exchanged?")
    yield from _lengths(config, own, where, kind)
    if kind == "yarn":
        yield from _yarn(config, own, where)


def _is_number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and not math.isnan(value)


def _lengths(config: Mapping[str, Any], own: Mapping[str, Any], where: str, kind: str) -> Iterator[Problem]:
    """Lists of factors that are not as long as there are frequencies; heads that are not turned in pairs."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    width = config.get("head_dim")
    if not width and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        width = hidden // heads
    share = own.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if not isinstance(width, int) or share is None:
        return
    if not _is_number(share) or not 0 < share <= 1:
        text = f"{where}: partial_rotary_factor is {escape(repr(share))[:40]}, expected more than 0, and 1 at most"
        yield Problem("error", text, "it is the share of each head that is turned")
        return
    turned = int(width * share)
    if turned % 2:
        yield Problem("error", f"{where}: {turned} of a head's {width} numbers are turned, which are no pairs", "")
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        value = own.get(key)
        if isinstance(value, list) and not all(map(_is_number, value)):
            odd = next(each for each in value if not _is_number(each))
            yield Problem("error", f"{where}: {key} holds {escape(repr(odd))[:40]}, expected numbers", "a misprint?")
        elif value is not None and not (isinstance(value, list) and len(value) == turned // 2):
            found = f"{len(value)} numbers" if isinstance(value, list) else escape(repr(value))[:40]
            text = f"{where}: {key} has {found}, expected {turned // 2}, half of the {turned} that are turned"
            yield Problem("error", text, "loading only warns, and running the model fails")


def _yarn(config: Mapping[str, Any], own: Mapping[str, Any], where: str) -> Iterator[Problem]:
    length, factor = config.get("max_position_embeddings"), own.get("factor")
    original = own.get(_ORIGINAL, config.get(_ORIGINAL))
    if not isinstance(length, int) or not _is_number(factor):
        return
    if original is None:
        yield Problem(
            "warning",
            f"{where}: yarn without {_ORIGINAL} takes max_position_embeddings, {length}, for the trained context",
            f"set {_ORIGINAL}; it is wrong if max_position_embeddings was raised to the new context",
        )
    elif _is_number(original) and abs(original * factor - length) > 0.01 * length and original != length:
        yield Problem(
            "warning",
            f"{where}: yarn stretches {original} by {factor:g} to {original * factor:g}, and max_position_embeddings "
            f"is {length}",
            "one of the three is not what it should be",
        )


def with_rope(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with rotary settings changed in both dialects: `theta`, `type`, `factor`, and any other by name.

    A type of its own begins anew, so that what another needed does not stay. Raises `UsageError` for names that are
    misspelt, and where each kind of layer has settings of its own.
    """
    inner_key = next((key for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    if inner_key is not None and "rope_parameters" not in config and "rope_theta" not in config:
        return {**config, inner_key: with_rope(config[inner_key], changes)}
    known = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _check_changes(known, changes)
    plain = {k: v for k, v in known.items() if k != "type"}
    theta = changes.get("theta", plain.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = changes.get("type", _kind(known))
    others = {k: v for k, v in changes.items() if k not in ("theta", "type")}
    kept = plain if kind == _kind(known) else {k: v for k, v in plain.items() if k == "partial_rotary_factor"}
    scaling = {**{k: v for k, v in kept.items() if k not in ("rope_theta", "rope_type")}, **others}
    new = {"rope_type": kind, "rope_theta": theta, **scaling}
    old = {"rope_type": kind, "type": kind, **scaling} if kind != "default" else None
    return {**config, "rope_theta": theta, "rope_scaling": old, "rope_parameters": new}


def _check_changes(known: Any, changes: Mapping[str, Any]) -> None:
    if not isinstance(known, Mapping):
        raise UsageError(f"config.json: rotary settings are {escape(repr(known))[:60]}, expected a mapping")
    by_layer = [key for key, own in known.items() if isinstance(own, Mapping)]
    first = next(iter(changes), "factor")
    if by_layer:
        name = first if first not in ("theta", "type") else f"rope_{first}"
        raise UsageError(
            f"config.json: each kind of layer has rotary settings of its own: {', '.join(map(escape, by_layer))}",
            hint=f"--set rope_parameters.{escape(str(by_layer[0]))}.{escape(name)}=... sets one of them",
        )
    names = (*_NUMBERS, *_OTHERS)
    for key in changes:
        near = difflib.get_close_matches(key, names, 1)
        if key not in names and ("." in key or near):
            hint = f"is {near[0]} meant?" if near else "rotary settings hold no others"
            raise UsageError(f"rope.{escape(key)} is no rotary setting", hint=hint)
