"""What lies beside the weights: which files describe the model and go along with it, by kind.

The kinds are those of transformers and of the hub. Whatever is none of them (data, notes, logs, keys, other weights)
stays where it is and is named, with its size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from weightops.checkpoint import Checkpoint, Copied, Sidecar, Written
from weightops.errors import CorruptInput
from weightops.formats.proofs import checksums, manifest
from weightops.formats.sniff import LFS_MAGIC
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.notebook import in_units
from weightops.stores.store import Store

MAX_NBYTES = 100_000_000
QUANTISED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json")
"""Files beside config.json that say how a checkpoint is quantised, and that a plain one must not have."""
_READ_EARLY = ("config.json", "weightops-delta.json", "adapter_config.json", *QUANTISED)
"""Sidecars that operations read: those of a remote checkpoint are fetched when it is opened."""
_MAX_NAMED = 8


class Kind(Enum):
    """A kind of file that goes along with a model."""

    CONFIG = "config"
    GENERATION = "generation"
    TOKENIZER = "tokenizer"
    TEMPLATE = "chat template"
    PROCESSOR = "processor"
    CODE = "code"
    NOTICE = "notice"
    CARD = "card"


_PATTERNS: dict[Kind, tuple[str, ...]] = {
    Kind.CONFIG: (
        *("config.json", "configuration.json", "params.json", "adapter_config.json", "weightops-delta.json"),
        *("quantization_config.json", "quantize_report.json", *QUANTISED),
        # sentence-transformers' list of modules, and the pooling that some decoders are used with
        *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/config.json"),
    ),
    Kind.GENERATION: ("generation_config.json",),
    Kind.TOKENIZER: (
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json"),
        *("added_tokens.json", "vocab*.json", "vocab.txt", "vocab.bpe", "merges.txt", "encoder.json", "tekken.json"),
        *("*.model", "*.spm", "*.tiktoken", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json"),
    ),
    Kind.TEMPLATE: ("chat_template.*", "*.jinja", "additional_chat_templates/*.jinja"),
    Kind.PROCESSOR: ("*processor_config.json", "audio_tokenizer_config.json"),
    Kind.NOTICE: ("license*", "licence*", "notice*", "copying*", "*_policy", "*_policy.*", "policy.md"),
    Kind.CARD: ("README.md",),
}
_FOLDED = (Kind.NOTICE,)
"""Kinds whose names people write in capitals or not."""
_SUBFOLDERS = tuple({p.partition("/")[0] for patterns in _PATTERNS.values() for p in patterns if "/" in p})
_RELATIVE = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.MULTILINE)
"""An import of another file of the folder, as transformers' `get_relative_imports` finds it."""


def kind_of(name: str) -> Kind | None:
    """The kind of a file that goes along, by its name; None for what stays, and for code, which only configs tell."""
    for kind, patterns in _PATTERNS.items():
        known = name.casefold() if kind in _FOLDED else name
        if any(fnmatchcase(known, pattern) and known.count("/") == pattern.count("/") for pattern in patterns):
            return kind
    return None


def is_tokenizer_file(name: str) -> bool:
    """Whether a file is part of a tokenizer: its code and chat templates too."""
    return kind_of(name) in (Kind.TOKENIZER, Kind.TEMPLATE) or fnmatchcase(name, "tokenization_*.py")


def find_sidecars(
    folder: Store, names: Sequence[str], weights: Collection[str], known: Collection[str]
) -> tuple[dict[str, Sidecar], list[str], dict[str, int | None]]:
    """The files of a folder that go along with `weights`, what there is to say of them, and what stays (`left`).

    `names` are what lies directly in it; of `known` ones something was said already.
    """
    sidecars: dict[str, Sidecar] = {}
    notes = []
    left: dict[str, int | None] = {}
    described = {name for name in names if kind_of(name)} | {n for s in _SUBFOLDERS for n in folder.below(s)}
    code = _code(folder, described)
    for name in sorted({*names, *described}):
        if name in weights or name in known or name.startswith(".") or _is_about_files(name):
            continue
        if not folder.has(name):
            if not any(fnmatchcase(name, pattern) for pattern in _SUBFOLDERS):
                left[f"{name}/"] = None
            continue
        file = folder.identity(name)
        if kind_of(name) is None and name not in code:
            left[name] = file.nbytes
            continue
        if file.nbytes > MAX_NBYTES:
            left[name] = file.nbytes
            continue
        if file.nbytes < 1024 and folder.is_near and folder.get(name).startswith(LFS_MAGIC):
            notes.append(f"{escape(name)}: a Git LFS pointer, not the file itself; run `git lfs pull`")
        if name in code:
            notes.append(f"{escape(name)}: code, carried along as data and never run")
        sidecars[name] = Written(folder.get(name)) if name in _READ_EARLY and not folder.is_near else Copied(file)
    return sidecars, notes, left


def _is_about_files(name: str) -> bool:
    """Whether a file describes these very files, so that the output has one of its own or needs none."""
    return manifest.is_manifest_name(name) or name.endswith(".index.json") or checksums.is_checksum_list(name)


def _code(folder: Store, names: Collection[str]) -> set[str]:
    """The Python files that a config's `auto_map` names, and those of the folder that they import."""
    pending = [
        f"{module}.py"
        for name in names
        if name.endswith("config.json") and "/" not in name
        for module in _auto_map(folder, name)
    ]
    found: set[str] = set()
    while pending:
        name = pending.pop()
        if name in found or not folder.has(name):
            continue
        found.add(name)
        text = folder.get(name).decode("utf-8", "replace")
        pending += [f"{(a or b).partition('.')[0]}.py" for a, b in _RELATIVE.findall(text)]
    return found


def _auto_map(folder: Store, name: str) -> Iterator[str]:
    """The modules of the folder that a config names, `modeling_x` of `modeling_x.XModel`."""
    try:
        document = strict_json.load_object(folder.get(name), name)
    except CorruptInput:
        return  # whoever needs the config says what is wrong with it
    references: Any = document.get("auto_map")
    for value in references.values() if isinstance(references, dict) else ():
        for reference in value if isinstance(value, list) else [value]:
            # `org/name--module.Class` is code of another repository.
            if isinstance(reference, str) and "--" not in reference and "/" not in reference:
                yield reference.partition(".")[0]


def left_behind(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Which files beside a checkpoint stay where they are, in words."""
    sizes = {name: "" if nbytes is None else f" ({in_units(nbytes)})" for name, nbytes in checkpoint.left.items()}
    named = [f"{escape(name)}{size}" for name, size in sizes.items()]
    more = [f"{len(named) - _MAX_NAMED} more"] if len(named) > _MAX_NAMED else []
    said = f"{escape(checkpoint.name)}: not carried along, as no part of the model: "
    return (said + ", ".join([*named[:_MAX_NAMED], *more]),) if named else ()
