"""The schemes of cast: linear layers in eight or four bits with scales, and what config.json says of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.quantized.weights import CONFIG_KEY
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.lazy import LazyTensor
from weightops.operations.cast.layers import Rules, check_unquantised, choose
from weightops.ops import mxfp4
from weightops.ops.elementwise import reshaped
from weightops.ops.fp8 import SCALED, Strategy, block_fp8, scaled_fp8
from weightops.ops.transpose import transposed
from weightops.spec import DType

Scheme = Literal["fp8", "fp8-block", "mxfp4"]
BLOCK = 128
"""Rows and columns of a block of fp8-block, as DeepSeek has them."""
_GPT_OSS = "gpt_oss"
_EXPERTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class _Form:
    """How a scheme writes the layers that it quantises.

    `write` gives the tensors of a weight by what is added to the name of its module; `config` what config.json says,
    with the modules that are left.
    """

    rules: Rules
    dtypes: tuple[DType, ...]
    write: Callable[[LazyTensor, str], Mapping[str, LazyTensor]]
    config: Callable[[Sequence[str]], Mapping[str, Any]]


def scaled(source: Checkpoint, kept: Collection[str], scheme: Scheme, strategy: Strategy) -> Checkpoint:
    """`source` with its linear layers as `scheme` has them, but for those `kept`; see `cast`."""
    if scheme == "mxfp4" and source.config().get("model_type") == _GPT_OSS:
        return _gpt_oss(source, kept)
    form = _form(scheme, strategy)
    layers = choose(source, kept, form.rules)
    tensors: dict[str, LazyTensor] = {}
    made: dict[LazyTensor, Mapping[str, LazyTensor]] = {}
    shards = dict(source.shards)
    for name, tensor in layers.source.items():
        if name not in layers.quantised:
            tensors[name] = tensor
            continue
        if tensor.spec.dtype not in form.dtypes:
            found = tensor.spec.dtype.value
            raise IncompatibleInputs(
                f"{escape(name)} is {found}: not quantised to {scheme}", hint=f"--keep {escape(name)}"
            )
        if tensor not in made:
            made[tensor] = form.write(tensor, name)
        parts = {f"{name.removesuffix('.weight')}.{part}": found for part, found in made[tensor].items()}
        tensors |= parts
        if name in layers.source.shards:
            shards |= dict.fromkeys(parts, layers.source.shards[name])
    if not made:
        raise UsageError(f"{escape(source.name)}: there is no linear layer to quantise", hint=layers.reason)
    notes = list(layers.notes)
    floats = {name for name, tensor in layers.source.items() if tensor.spec.dtype.is_float and name in tensors}
    stacked = {name for name in floats if len(tensors[name].spec.shape) > 2} - set(kept)
    if stacked:
        notes.append(f"no matrices, and left as they are: {listed(stacked)}")
    result = replace(layers.source, tensors=tensors, shards=shards, warnings=(*source.warnings, *notes))
    document = form.config(layers.ignored)
    return result.with_config(lambda config: {**config, CONFIG_KEY: document})


def _form(scheme: Scheme, strategy: Strategy) -> _Form:
    match scheme:
        case "fp8":
            return _Form(Rules(), SCALED, partial(_by_rows, strategy), partial(_rows_config, strategy))
        case "fp8-block":
            rules = Rules(f"blocks of {BLOCK} x {BLOCK}", (BLOCK, BLOCK), takes_experts_apart=False)
            return _Form(rules, SCALED, _by_blocks, _blocks_config)
        case "mxfp4":
            rules = Rules(f"groups of {mxfp4.GROUP}", (1, mxfp4.GROUP))
            return _Form(rules, mxfp4.DTYPES, _by_groups, _groups_config)


def _by_rows(strategy: Strategy, tensor: LazyTensor, name: str) -> Mapping[str, LazyTensor]:
    codes, scale = scaled_fp8(tensor, strategy, name)
    return {"weight": codes, "weight_scale": scale}


def _by_blocks(tensor: LazyTensor, name: str) -> Mapping[str, LazyTensor]:
    codes, scale = block_fp8(tensor, BLOCK, name)
    return {"weight": codes, "weight_scale_inv": scale}


def _by_groups(tensor: LazyTensor, name: str) -> Mapping[str, LazyTensor]:
    codes, exponents = mxfp4.mxfp4(tensor, name)
    return {"weight_packed": codes, "weight_scale": exponents}


def _arguments(num_bits: int, strategy: str, group_size: int | None, dynamic: bool = False) -> dict[str, Any]:
    """What compressed-tensors says of numbers with a scale."""
    return {
        "dynamic": dynamic,
        "group_size": group_size,
        "num_bits": num_bits,
        "strategy": strategy,
        "symmetric": True,
        "type": "float",
    }


def _compressed(
    form: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None, ignore: Sequence[str]
) -> Mapping[str, Any]:
    """`quantization_config` as compressed-tensors 0.20 writes it."""
    group = {
        "format": form,
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _rows_config(strategy: Strategy, ignore: Sequence[str]) -> Mapping[str, Any]:
    """That of llm-compressor's FP8_DYNAMIC."""
    activations = _arguments(8, "token", None, dynamic=True)
    return _compressed("float-quantized", _arguments(8, strategy, None), activations, ignore)


def _groups_config(ignore: Sequence[str]) -> Mapping[str, Any]:
    """That of llm-compressor's MXFP4A16."""
    weights = _arguments(4, "group", mxfp4.GROUP) | {"scale_dtype": "torch.uint8"}
    return {**_compressed("mxfp4-pack-quantized", weights, None, ignore), "version": "0.20.0"}


def _blocks_config(ignore: Sequence[str]) -> Mapping[str, Any]:
    """DeepSeek's: what is left has one name for transformers, and another for vLLM."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "ignored_layers": list(ignore),
        "modules_to_not_convert": list(ignore),
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def _gpt_oss(source: Checkpoint, kept: Collection[str]) -> Checkpoint:
    """gpt-oss as it is published: its experts in MXFP4, all else as it is."""
    check_unquantised(source)
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    tensors: dict[str, LazyTensor] = {}
    shards = dict(source.shards)
    quantised, whole = set[str](), set[str]()
    for name, tensor in source.items():
        module, _, part = name.rpartition(".")
        if not (module.endswith(".experts") and part in _EXPERTS and len(tensor.spec.shape) == 3):
            tensors[name] = tensor
            continue
        (whole if name in kept else quantised).add(module)
        if name in kept:
            tensors[name] = tensor
            continue
        if tensor.spec.shape[1] % mxfp4.GROUP:
            raise UsageError(
                f"{escape(name)} is {tensor.spec}: its rows are no whole groups of {mxfp4.GROUP}",
                hint=f"--keep '{escape(module)}.*'",
            )
        codes, exponents = mxfp4.mxfp4(transposed(tensor), name)
        *batch, groups = exponents.spec.shape
        parts = {f"{name}_blocks": reshaped(codes, (*batch, groups, mxfp4.GROUP // 2)), f"{name}_scales": exponents}
        tensors |= parts
        if name in shards:
            shards |= dict.fromkeys(parts, shards.pop(name))
    if quantised & whole:
        raise UsageError(
            f"{escape(source.name)}: transformers has all of {escape(min(quantised & whole))} in MXFP4 or nothing",
            hint=f"--keep '{escape(min(quantised & whole))}.*'",
        )
    if not quantised:
        raise UsageError(f"{escape(source.name)}: there are no experts to quantise", hint="is it a whole model?")
    document = {"modules_to_not_convert": [*left, *sorted(whole)], "quant_method": "mxfp4"}
    result = replace(source, tensors=tensors, shards=shards)
    return result.with_config(lambda config: {**config, CONFIG_KEY: document})
