"""Which files of a folder are the weights of its model: by names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from weightops.errors import CorruptInput, NoWeights
from weightops.formats.adapter.files import model_files
from weightops.io.escape import escape

_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".pth.lora")
SINGLE_SUFFIXES = (".gguf", ".dat")
"""Ends of the names of files that are a whole model, or importance matrix, by themselves."""
WEIGHT_SUFFIXES = (".safetensors", ".wdelta", *_TORCH_SUFFIXES, ".gguf")
_NOT_WEIGHTS = re.compile(
    r"((training_args|optimizer|scheduler|scaler|sampler|trainer_state)(_\d+)?|rng_state.*|random_states.*"
    r"|.*_optim_states)\.\w+"
)
_BESIDE_GGUF = re.compile(r"(.*[-_.])?mmproj([-_.].*)?\.gguf|(.*[-_.])?imatrix\.gguf", re.IGNORECASE)
"""What lies beside GGUF models and is none: the half that sees, and importance matrices."""
PART = re.compile(r"consolidated\.(\d\d)\.pth")
_NUMBERED = re.compile(r"(?P<stem>.+?)-(?P<number>\d+)(-of-(?P<count>\d+))?\.\w+")


def find_index(names: Iterable[str], shown: str) -> str | None:
    """The index to go by: safetensors before torch, the usual name before others."""
    found = [n for n in names if n.endswith(".index.json")]
    for pattern in ("model.safetensors", "*.safetensors", "*.wdelta", "pytorch_model.bin", "*.bin"):
        matching = [n for n in found if Path(n.removesuffix(".index.json")).match(pattern)]
        if len(matching) > 1:
            raise CorruptInput(
                f"{shown}: several indexes ({', '.join(map(escape, matching))})",
                hint="keep one variant per folder",
            )
        if matching:
            return matching[0]
    return None


def chosen(names: Iterable[str], pattern: str) -> list[str]:
    """The weight files and indexes that match a pattern, and all other files."""
    return [n for n in names if fnmatch(n, pattern) or not (is_weights(n) or n.endswith(".index.json"))]


def is_weights(name: str) -> bool:
    """Whether a file is one of weights, by its name."""
    return name.endswith(WEIGHT_SUFFIXES) and not name.startswith(".") and not _NOT_WEIGHTS.fullmatch(name)


def weights_without_index(names: Iterable[str], shown: str, is_named: bool = False) -> list[str]:
    """The weight files of a folder that has no index: one file, or one complete numbered set.

    Files that were named by a pattern (`is_named`) may also have no numbers.
    """
    known = model_files([n for n in names if is_weights(n)])
    for suffixes in ((".safetensors",), (".wdelta",), _TORCH_SUFFIXES, (".gguf",)):
        weights = [n for n in known if n.endswith(suffixes)]
        weights = [n for n in weights if not _BESIDE_GGUF.fullmatch(n)] or weights
        usual = [n for n in weights if n in ("model.safetensors", "pytorch_model.bin")]
        if weights and all(map(PART.fullmatch, weights)):
            return _check_parts(weights, shown)
        if usual or len(weights) == 1:
            (single,) = usual or weights
            matched = _NUMBERED.fullmatch(single)
            if matched and matched["count"] and int(matched["count"]) > 1:
                _check_numbering(weights, shown)
            return [single]
        if weights:
            if not (is_named and any(_NUMBERED.fullmatch(n) is None for n in weights)):
                _check_numbering(weights, shown)
            return weights
    raise NoWeights(f"{shown}: holds no weights (looked for {', '.join(WEIGHT_SUFFIXES)})")


def _check_numbering(weights: list[str], shown: str) -> None:
    """Accept `-0000i-of-0000n` sets from 0 or 1 without gaps, and `-i` sets; refuse anything else."""
    matches = [_NUMBERED.fullmatch(n) for n in weights]
    if None in matches or len({(m["stem"], m["count"]) for m in matches if m}) > 1:
        raise CorruptInput(
            f"{shown}: holds {len(weights)} weight files, {escape(weights[0])} first, and no index",
            hint="name one file or, in quotes, a pattern that all of them match, or add the index",
        )
    numbers = sorted(int(m["number"]) for m in matches if m)
    count = matches[0]["count"] if matches[0] else None
    first = 0 if numbers[0] == 0 else 1
    last = first + len(numbers) - 1
    complete = numbers == list(range(first, last + 1)) and (count is None or int(count) in (last, last + 1))
    if not complete or (count is not None and first == 1 and int(count) != last):
        raise CorruptInput(
            f"{shown}: incomplete: shards {', '.join(map(str, numbers))} of {count or 'a numbered set'}, and no index",
            hint="download the missing shards",
        )


def _check_parts(weights: list[str], shown: str) -> list[str]:
    """Accept `consolidated.00.pth` and its successors without gaps."""
    numbers = [int(m[1]) for name in weights if (m := PART.fullmatch(name))]
    if numbers != list(range(len(numbers))):
        raise CorruptInput(
            f"{shown}: holds the parts {', '.join(f'{n:02d}' for n in numbers)} of a model in Meta's layout, "
            f"expected {', '.join(f'{n:02d}' for n in range(len(numbers)))}",
            hint="download the missing parts",
        )
    return weights
