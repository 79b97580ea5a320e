"""Writes a LoRA adapter as llama.cpp loads it, byte for byte as its own converter does.

Source: llama.cpp's convert_lora_to_gguf, as of llama-cpp-python 0.3.36; llama-adapter.cpp and llama-graph.cpp for what
comes of the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.adapter.config import EDITED
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.lora import STACKED, Adapter, Factors
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.gguf.adapter_base import Base
from weightops.layouts.gguf.general import general
from weightops.layouts.gguf.links import Link, find_links
from weightops.layouts.gguf.saved import Saved
from weightops.layouts.gguf.transforms import of_factors
from weightops.layouts.gguf.write import EMBEDDING, OF_SIGHT, SIGHT, fitting, stored
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import Scale, cast
from weightops.ops.transpose import transposed
from weightops.spec import DType

ALPHA = "adapter.lora.alpha"
DTYPES = (DType.F32, DType.F16, DType.BF16, DType.Q8_0)
"""The types that the converter writes; float32 is its default."""
NORM = "_norm.weight"
"""The end of the names of tensors that llama.cpp lets an adapter have beside factors."""
_MOST = 1e6
"""By how much scales may differ: beyond, factors would leave float16, or float32, and be of no use."""
_OTHER_MODEL = "is this the model that the adapter was trained on?"
_MERGE = "`weightops merge-lora` puts it into the base, and `weightops convert` makes a GGUF file of that"


class _Module(NamedTuple):
    """Factors A `[rank, in]` and B `[out, rank]`, or of an embedding `[rank, tokens]` and `[width, rank]`."""

    path: str
    factors: Factors
    alpha: float
    """What llama.cpp has to divide by the rank to scale it as peft does."""


def write(adapter: Adapter, base: Base, about: Saved, dtype: DType = DType.F32) -> Checkpoint:
    """The adapter as llama.cpp loads it beside a GGUF file of `base`, its factors in `dtype`.

    `about` are the name and the files of its folder. A file has one alpha: where modules have others, B is multiplied
    by what is missing, in float32. Raises `UsageError` for what GGUF has no place for and for other types,
    `IncompatibleInputs` for factors that do not fit the base, `CorruptInput` where config and tensors contradict each
    other.
    """
    where = escape(adapter.name)
    if dtype not in DTYPES:
        known = ", ".join(each.value for each in DTYPES)
        raise UsageError(f"adapters are not written in {dtype.value}", hint=f"choose one of {known}")
    modules, dropped = _modules(adapter, base, where)
    norms = _norms(adapter, base, where)
    alpha = Counter(module.alpha for module in modules.values()).most_common(1)[0][0]
    tensors, scaled = dict[str, LazyTensor](), []
    links = find_links(base.family, base.settings, [*norms, *modules], where)
    for name in links.dropped:
        raise UsageError(f"{where}: {escape(name)}: {links.dropped[name]}; an adapter cannot change it in GGUF")
    for link in links.links:
        made = _norm(link, norms, where) if link.saved[0] in norms else _factors(link, modules, alpha, base, where)
        for name, tensor in made:
            if name in tensors:
                raise CorruptInput(f"{where}: {escape(link.saved[0])} is in the files under another name as well")
            tensors[name] = _typed(name, tensor, dtype)
        scaled += [name for name in link.saved if name in modules and modules[name].alpha != alpha]
    said = []
    if norms:
        said.append(f"{where}: llama.cpp passes over norms of adapters: {listed([*norms])}")
    if scaled:
        what = f"the scales of {len(scaled)} modules are multiplied into their lora_B"
        said.append(f"{where}: GGUF has one alpha, which is {alpha:g} here; {what}")
    about_it, card = general(about, {name: tensor.spec for name, tensor in tensors.items()}, adapter=True)
    metadata = {
        "general.architecture": {"string": base.family.arch},
        **about_it,
        ALPHA: {"float32": float(np.float32(alpha))},
        "general.quantization_version": {"uint32": 2},
    }
    return Checkpoint(
        adapter.name,
        tensors,
        sidecars=about.sidecars,
        warnings=(*about.warnings, *adapter.notes, *card, *said),
        metadata=metadata,
        container="gguf",
        in_one_file=True,  # llama.cpp puts parts of models together, not of adapters
        dropped={**about.dropped, **dropped},
    )


def _modules(adapter: Adapter, base: Base, where: str) -> tuple[dict[str, _Module], dict[str, str]]:
    """What has factors, by the name of its weight; and what is left out, with the reason."""
    found, dropped = dict[str, _Module](), dict[str, str]()
    tied = {name for group in base.architecture.tied for name in group}
    for (path, depth), factors in adapter.factors.items():
        name = f"{path}.weight"
        if base.sees and SIGHT.search(name):
            dropped[path] = OF_SIGHT
            continue
        _refuse_more(adapter, path, depth, factors, where)
        name = name.replace("language_model.", "") if base.sees else name
        alpha = _alpha(adapter, path, factors, where)
        if name in found:
            raise CorruptInput(f"{where}: {escape(path)} is in the files under another name as well")
        if name in tied:
            raise _no_place(where, path, f"factors, and {base.where} has one tensor for both of its embeddings")
        found[name] = _Module(path, factors, alpha)
    for name in adapter.base:
        if not name.endswith(".weight"):
            raise _no_place(where, name, "a bias beside factors")
        dropped[name] = "a copy of the base's, which peft saves beside factors of embeddings"
    if adapter.rows:
        raise _no_place(where, next(iter(adapter.rows)), "rows of an embedding for some tokens")
    if not found:
        raise IncompatibleInputs(f"{where}: holds no factors of a language model", hint=_OTHER_MODEL)
    return found, dropped


def _refuse_more(adapter: Adapter, path: str, depth: int, factors: Factors, where: str) -> None:
    """Raise `UsageError` for what is no plain pair of matrices."""
    if depth or any(name in STACKED for name in adapter.parameters(path)):
        raise _no_place(where, path, "factors of experts that are stacked in one parameter")
    if factors.magnitude is not None:
        raise _no_place(where, path, "a magnitude (DoRA)")
    if factors.bias is not None:
        raise _no_place(where, path, "a bias beside lora_B (lora_bias)")
    if {len(factors.a.spec.shape), len(factors.b.spec.shape)} != {2}:
        raise _no_place(where, path, "factors that are no matrices")


def _no_place(where: str, name: str, what: str) -> UsageError:
    return UsageError(f"{where}: {escape(name)} has {what}, for which adapters in GGUF have no place", hint=_MERGE)


def _alpha(adapter: Adapter, path: str, factors: Factors, where: str) -> float:
    """llama.cpp's alpha for a module, by whose rank it is divided; raises `CorruptInput` for a rank of another size."""
    rank = adapter.rank(path)
    own = factors.a.spec.shape[0]
    if rank != own:
        raise CorruptInput(
            f"{where}: {escape(path)} has factors of rank {own}, {CONFIG_NAME} says {rank}",
            hint=EDITED,
        )
    alpha = adapter.alpha(path) * (math.sqrt(rank) if adapter.config.use_rslora else 1)
    with np.errstate(over="ignore"):
        is_usual = bool(np.isfinite(np.float32(alpha)) and np.float32(alpha))
    if not is_usual:
        raise CorruptInput(
            f"{where}: {CONFIG_NAME}: lora_alpha of {escape(path)} is {alpha:g}",
            hint="llama.cpp takes 0 for no scale at all; expected any other number",
        )
    return alpha


def _norms(adapter: Adapter, base: Base, where: str) -> dict[str, LazyTensor]:
    """The norms that are kept whole, by name; raises `UsageError` for anything else that is."""
    found = dict[str, LazyTensor]()
    for path, tensor in adapter.whole.items():
        name = path.replace("language_model.", "") if base.sees else path
        known = base.shape(name)
        if not name.endswith("norm.weight") or len(tensor.spec.shape) != 1:
            raise _no_place(where, path, "no factors, and is kept whole (modules_to_save)")
        if known not in (None, tensor.spec.shape):
            raise _does_not_fit(where, path, tensor.spec.shape, known, base)
        found[name] = tensor
    return found


def _norm(link: Link, norms: Mapping[str, LazyTensor], where: str) -> Iterator[tuple[str, LazyTensor]]:
    tensors = link.out([norms[name] for name in link.saved], where)
    yield from zip(link.packed, tensors, strict=True)


def _factors(
    link: Link, modules: Mapping[str, _Module], alpha: float, base: Base, where: str
) -> Iterator[tuple[str, LazyTensor]]:
    """The two tensors of a link, which may stack those of experts."""
    own = [modules[name] for name in link.saved]
    sides = of_factors(link.transform)
    if sides is None:
        raise _no_place(where, own[0].path, "factors of a tensor that llama.cpp takes apart")
    for name, module in zip(link.saved, own, strict=True):
        if module.factors.is_embedding != (link.packed[0] == EMBEDDING):
            kind = "an embedding" if module.factors.is_embedding else "a linear layer"
            raise CorruptInput(f"{where}: {escape(module.path)} has factors of {kind}, and is none", hint=EDITED)
        out, inner = module.factors.b.spec.shape[0], module.factors.a.spec.shape[1]
        shape = (inner, out) if module.factors.is_embedding else (out, inner)
        known = base.shape(name)
        if known not in (None, shape):
            raise _does_not_fit(where, module.path, shape, known, base)
    ranks = sorted({module.factors.a.spec.shape[0] for module in own})
    if len(ranks) > 1:
        raise UsageError(
            f"{where}: experts of {escape(link.packed[0])} have factors of ranks {listed(map(str, ranks))}, and GGUF "
            "stacks them in one tensor",
            hint=_MERGE,
        )
    left = replace(link, transform=sides[0]).out([module.factors.a for module in own], where)
    right = replace(link, transform=sides[1]).out([_scaled(module, alpha, where) for module in own], where)
    for name, a, b in zip(link.packed, left, right, strict=True):
        # llama.cpp looks rows of A up, by token.
        yield f"{name}.lora_a", transposed(a) if name == EMBEDDING else a
        yield f"{name}.lora_b", b


def _scaled(module: _Module, alpha: float, where: str) -> LazyTensor:
    b, by = module.factors.b, module.alpha / alpha
    if not 1 / _MOST < abs(by) < _MOST:
        raise UsageError(
            f"{where}: {escape(module.path)} has {by:g} times the scale of other modules, and GGUF has one alpha",
            hint=_MERGE,
        )
    return b if by == 1 else LazyTensor.make(Scale(by), cast(b, DType.F32))


def _does_not_fit(
    where: str, name: str, shape: Sequence[int], known: Sequence[int] | None, base: Base
) -> IncompatibleInputs:
    return IncompatibleInputs(
        f"{where}: {escape(name)} is for a tensor of {list(shape)}, in {base.where} it is {list(known or ())}",
        hint=_OTHER_MODEL,
    )


def _typed(name: str, tensor: LazyTensor, dtype: DType) -> LazyTensor:
    """A tensor as the converter stores it: factors of routers are not kept from being small, as routers are."""
    chosen = DType.F32 if name.endswith(NORM) else fitting(dtype, tensor.spec)
    is_narrow = chosen is not DType.F32 and tensor.spec.dtype not in (DType.F32, DType.F16)
    return stored(name, cast(tensor, DType.F32) if is_narrow else tensor, chosen)
