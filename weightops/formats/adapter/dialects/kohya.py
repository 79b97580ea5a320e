"""Adapters of kohya's sd-scripts: lora_down, lora_up and alpha of each module, whose name has underscores for dots.

Source: `networks/lora.py` of sd-scripts. A name says no longer where its dots were. They are found by the modules of a
base, or for names as in LLaMA and CLIP by a table; what may be two modules is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.dialects.common import Base, Stored, make_module, pairs_of, require_linear
from weightops.formats.adapter.lora import LoraModule
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.rows import Given
from weightops.spec import DType

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_PREFIX = re.compile(r"lora_(unet|te\d?|transformer)_")
_OF_PICTURES = re.compile(r"(down_blocks|mid_block|up_blocks|(\w+_)?transformer_blocks|(double|single)_blocks)\.")
_KNOWN = (
    re.compile(
        r"((?P<outer>language_model|model)_)?(?P<stem>model|language_model)_layers_(?P<number>\d+)_"
        r"(?P<part>self_attn|mlp)_(?P<last>(q|k|v|o|qkv|gate|up|down|gate_up)_proj)"
    ),
    re.compile(
        r"(?P<stem>text_model)_encoder_layers_(?P<number>\d+)_"
        r"(?P<part>self_attn|mlp)_(?P<last>(q|k|v|out)_proj|fc[12])"
    ),
)


def read(checkpoint: Checkpoint, base: Base, evaluate: Evaluate) -> list[LoraModule]:
    """The modules of an adapter of sd-scripts; the scale is alpha / rank, and 1 without an alpha, as there."""
    where = escape(checkpoint.name)
    pairs = pairs_of(checkpoint, DOWN, UP, (ALPHA,))
    flat = _by_flat_name(base.modules)
    alphas = [parts[ALPHA] for parts in pairs.values() if ALPHA in parts]
    odd = next((each for each in alphas if each.spec.numel != 1 or not each.spec.dtype.is_float), None)
    if odd is not None:
        raise IncompatibleInputs(f"{where}: an alpha is {odd.spec}, expected one number")
    numbers = iter([struct.unpack("<f", data)[0] for data in evaluate([cast(each, DType.F32) for each in alphas])])
    found = []
    for name, parts in pairs.items():
        down, up = parts[DOWN], parts[UP]
        rank = down.spec.shape[0] if down.spec.shape else 1
        scale = next(numbers) / rank if ALPHA in parts else 1.0
        found.append(make_module(where, _path(name, flat, where), scale, down, up))
    return found


def _by_flat_name(modules: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(module.replace(".", "_"), []).append(module)
    return found


def _path(name: str, flat: Mapping[str, list[str]], where: str) -> str:
    """The module that a name with underscores is."""
    prefix = _PREFIX.match(name)
    own = name[prefix.end() :] if prefix else name
    if flat:
        found = flat.get(own, [])
        if len(found) != 1:
            what = f"may be {' or '.join(map(escape, found))}" if found else "is no module"
            raise IncompatibleInputs(
                f"{where}: {escape(name)} {what} of the base",
                hint="is this the base that the adapter was trained on?",
            )
        return found[0]
    for known in _KNOWN:
        if match := known.fullmatch(own):
            parts = match.groupdict()
            layers = "encoder.layers" if parts["stem"] == "text_model" else "layers"
            outer = f"{parts['outer']}." if parts.get("outer") else ""
            return f"{outer}{parts['stem']}.{layers}.{parts['number']}.{parts['part']}.{parts['last']}"
    if own == "lm_head":
        return own
    raise IncompatibleInputs(
        f"{where}: {escape(name)}: where its underscores are dots is known of LLaMA's and CLIP's names alone",
        hint="--base MODEL, by whose modules it is found",
    )


def write(modules: Sequence[LoraModule], base: Base) -> Stored:
    """The adapter as sd-scripts has it; raises `IncompatibleInputs` for what it has no place for."""
    plain = [each for each in modules if len(each.factors.a.spec.shape) == 2]
    require_linear(plain, "sd-scripts")
    tensors: dict[str, LazyTensor] = {}
    for module in modules:
        kind = "unet" if _OF_PICTURES.match(module.path) else "te"
        name = f"lora_{kind}_{module.path.replace('.', '_')}"
        if f"{name}{DOWN}" in tensors:
            raise IncompatibleInputs(f"{escape(module.path)}: another module is called {name} in sd-scripts too")
        alpha = struct.pack("<f", module.scale * module.rank)
        tensors[f"{name}{DOWN}"] = module.factors.a
        tensors[f"{name}{UP}"] = module.factors.b
        tensors[f"{name}{ALPHA}"] = LazyTensor.make(Given(DType.F32, (), alpha, number=len(tensors)))
    ranks = {module.rank for module in modules}
    alphas = {module.scale * module.rank for module in modules}
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    return Stored(tensors, {}, "lora", metadata=metadata)
