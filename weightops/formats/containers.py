"""The containers that can be written: how tensors are grouped into files, and the bytes of each file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.formats.compressed import SUFFIX as COMPRESSED
from weightops.formats.compressed import compressed_layout
from weightops.formats.layout import Layout
from weightops.formats.quantized.parts import module_of_part
from weightops.formats.safetensors import safetensors_layout, sharing_layout
from weightops.formats.torch import Flavour, torch_layout
from weightops.io.names import listed
from weightops.lazy import LazyTensor

Tensors = Mapping[str, LazyTensor]
Groups = list[list[str]]
Files = list[tuple[str, list[str]]]
"""File names, each with the tensors in it."""


@dataclass(frozen=True)
class Container:
    """A file format. `layout` gives a file's bytes from its name, its tensors and the checkpoint's metadata.

    `files` groups tensors by bytes per file, or as they come if that is None. `suffix` ends a file's name.
    `has_metadata`: there is room for what safetensors has as `__metadata__`. `shares`: bytes that several names share
    are stored once. `counts`: its index names the number of parameters. `is_divided`: files may have a largest size,
    and have one by default unless it `is_whole`.
    `sharing`: the layout of a file that shares blocks with its sources, where the format leaves room for that.
    """

    layout: Callable[[str, Tensors, Mapping[str, Any]], Layout]
    files: Callable[[Checkpoint, int | None], Files]
    suffix: str
    has_metadata: bool = False
    shares: bool = False
    counts: bool = True
    has_index: bool = True
    is_divided: bool = True
    is_whole: bool = False
    sharing: Callable[[str, Tensors, Mapping[str, Any]], Layout] | None = None


def find_aliases(tensors: Tensors) -> dict[str, str]:
    """Names whose tensor is the very bytes of an earlier name's, with that name."""
    first: dict[LazyTensor, str] = {}
    return {n: first[t] for n, t in tensors.items() if t.nbytes and first.setdefault(t, n) != n}


def _units(tensors: Tensors) -> list[tuple[list[str], int]]:
    """What stays in one file, with its bytes: each tensor, but all parts of a quantised weight with their module's.

    Loaders of bitsandbytes and of fused kernels look for the parts of a weight in the file that they read it from.
    """
    part_of = {name: module_of_part(name) for name in tensors}
    modules = set(part_of.values())
    units: dict[str, tuple[list[str], int]] = {}
    for name, tensor in tensors.items():
        module = part_of[name] or name.rpartition(".")[0]
        unit = f"{module}." if module in modules else name
        names, nbytes = units.setdefault(unit, ([], 0))
        units[unit] = ([*names, name], nbytes + tensor.nbytes)
    return list(units.values())


def pack(tensors: Tensors, max_nbytes: int) -> Groups:
    """Greedy in order, as huggingface_hub's split_torch_state_dict_into_shards does.

    A tensor above the limit gets a shard of its own, before the one that is open.
    """
    shards: Groups = []
    current: list[str] = []
    current_nbytes = 0
    for names, nbytes in _units(tensors):
        if nbytes > max_nbytes:
            shards.append(names)
            continue
        if current_nbytes + nbytes > max_nbytes:
            shards.append(current)
            current, current_nbytes = [], 0
        current += names
        current_nbytes += nbytes
    return [*shards, current] if current or not shards else shards


def pack_shared(tensors: Tensors, max_nbytes: int) -> Groups:
    """Like `pack`, for containers that store shared bytes once: aliases follow the first name and weigh nothing."""
    aliases = find_aliases(tensors)
    shards = pack({n: t for n, t in tensors.items() if n not in aliases}, max_nbytes)
    for alias, name in aliases.items():
        next(shard for shard in shards if name in shard).append(alias)
    return shards


def pack_2023(tensors: Tensors, max_nbytes: int) -> Groups:
    """Greedy in order, as transformers 4.28's shard_checkpoint did (but without its empty first shard)."""
    shards: Groups = [[]]
    current_nbytes = 0
    for names, nbytes in _units(tensors):
        if current_nbytes + nbytes > max_nbytes and shards[-1]:
            shards.append([])
            current_nbytes = 0
        shards[-1] += names
        current_nbytes += nbytes
    return shards


def _numbered(
    rule: Callable[[Tensors, int], Groups], stem: str, suffix: str, number: str = "-{:05d}-of-{:05d}", first: int = 1
) -> Callable[[Checkpoint, int | None], Files]:
    """Files named as transformers names shards, after the checkpoint's own stem if it has one."""

    def files(checkpoint: Checkpoint, max_nbytes: int | None) -> Files:
        groups = _as_they_are(checkpoint) if max_nbytes is None else rule(checkpoint.tensors, max_nbytes)
        name = checkpoint.prefix or stem
        if len(groups) == 1:
            return [(f"{name}{suffix}", groups[0])]
        return [(f"{name}{number.format(i, len(groups))}{suffix}", group) for i, group in enumerate(groups, first)]

    return files


def _as_they_are(checkpoint: Checkpoint) -> Groups:
    return [names for _, names in _by_shard(checkpoint.shards, checkpoint.tensors)]


def _by_shard(shards: Mapping[str, str], names: Iterable[str]) -> Files:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(shards.get(name, ""), []).append(name)
    return sorted(groups.items())


def _torch(flavour: Flavour) -> Callable[[str, Tensors, Mapping[str, Any]], Layout]:
    def layout(name: str, tensors: Tensors, metadata: Mapping[str, Any]) -> Layout:
        specs = [(name, tensor.spec) for name, tensor in tensors.items()]
        root = name.rpartition(".")[0]
        return torch_layout(specs, find_aliases(tensors), flavour=flavour, root=root, prefix=f"{root}/")

    return layout


def _safetensors(name: str, tensors: Tensors, metadata: Mapping[str, Any]) -> Layout:
    return safetensors_layout([(name, tensor.spec) for name, tensor in tensors.items()], metadata)


def _gguf(name: str, tensors: Tensors, metadata: Mapping[str, Any]) -> Layout:
    from weightops.formats.gguf import gguf_layout  # imported here because few runs write it
    from weightops.formats.gguf.split import part_metadata

    return gguf_layout([(name, tensor.spec) for name, tensor in tensors.items()], part_metadata(name, metadata))


def _dat(name: str, tensors: Tensors, metadata: Mapping[str, Any]) -> Layout:
    from weightops.formats.gguf.imatrix import dat_layout

    return dat_layout(tensors, metadata)


def _gguf_files(checkpoint: Checkpoint, max_nbytes: int | None) -> Files:
    """One file, or parts as llama-gguf-split makes them."""
    stem, names = checkpoint.prefix or "model", list(checkpoint)
    if max_nbytes is None:
        return [(f"{stem}.gguf", names)]
    from weightops.formats.gguf.split import divided, named

    groups = divided([(name, checkpoint[name].nbytes) for name in names], max_nbytes)
    if len(groups) == 1:
        return [(f"{stem}.gguf", names)]
    return [(named(stem, i, len(groups)), group) for i, group in enumerate(groups, 1)]


CONTAINERS: Mapping[str, Container] = {
    "safetensors": Container(
        _safetensors, _numbered(pack, "model", ".safetensors"), ".safetensors", True, sharing=sharing_layout
    ),
    "wdelta": Container(compressed_layout, _numbered(pack, "delta", COMPRESSED), COMPRESSED, True),
    "torch": Container(_torch("torch"), _numbered(pack_shared, "pytorch_model", ".bin"), ".bin", shares=True),
    "torch-1.12": Container(_torch("torch-1.12"), _numbered(pack_2023, "pytorch_model", ".bin"), ".bin", counts=False),
    "tencentpretrain": Container(
        _torch("torch"),
        _numbered(pack_shared, "tencentpretrain_model", ".bin", "-{}", first=0),
        ".bin",
        shares=True,
        counts=False,
    ),
    "meta": Container(
        _torch("torch"),
        lambda checkpoint, _: _by_shard(checkpoint.shards, checkpoint.tensors),
        ".pth",
        has_index=False,
        is_divided=False,
    ),
    "lit": Container(
        _torch("torch"),
        lambda checkpoint, _: [(f"{checkpoint.prefix}.lora", list(checkpoint))],
        ".pth.lora",
        has_index=False,
        is_divided=False,
    ),
    "gguf": Container(
        _gguf,
        _gguf_files,
        ".gguf",
        has_metadata=True,
        has_index=False,
        is_whole=True,
    ),
    "imatrix.dat": Container(
        _dat,
        lambda checkpoint, _: [(f"{checkpoint.prefix or 'imatrix'}.dat", list(checkpoint))],
        ".dat",
        has_metadata=True,
        has_index=False,
        is_divided=False,
    ),
}
_TYPED = ("gguf", "imatrix.dat")
"""Containers whose metadata has types."""
FORMATS = ("safetensors", "torch", "torch-1.12")
"""Containers that hold any checkpoint; the others belong to a layout."""


def metadata_in(container: str, metadata: Mapping[str, Any], divided: int | None = None) -> dict[str, Any]:
    """A checkpoint's metadata as files of a container have it: with types in GGUF files, as strings in all others.

    Arrays of GGUF become lists, so that a plan can hold them. `divided` is how many tensors there are in all, where
    they are in several files.
    """
    if container in _TYPED:
        if divided is not None:
            from weightops.formats.gguf.split import TENSORS

            metadata = {**metadata, TENSORS: {"int32": divided}}
        return {key: _listed(value) for key, value in metadata.items() if isinstance(value, Mapping)}
    kept = {key: value for key, value in metadata.items() if not isinstance(value, Mapping)}
    return kept if len(kept) == len(metadata) else {"format": "pt", **kept}


def _listed(value: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: [found[0], list(found[1])] if kind == "array" else found for kind, found in value.items()}


def without_place(metadata: Mapping[str, Any], container: str) -> tuple[str, ...]:
    """What of a checkpoint's metadata a container has no place for, in words."""
    kept = metadata_in(container, metadata) if CONTAINERS[container].has_metadata else {}
    lost = sorted(metadata.keys() - kept.keys() - {"format"})
    if not lost:
        return ()
    is_typed = isinstance(metadata[lost[0]], Mapping)
    what = "metadata of the source's GGUF files" if is_typed else "__metadata__ of the source"
    named = listed(lost, 3 if is_typed else 10)
    return (f"{container} files have no place for the {what}: {named} left out",)
