"""Layers that add nothing to the residual until they are trained: what their blocks write is zero."""

from __future__ import annotations

import re
from collections.abc import Collection

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.lazy import LazyTensor
from weightops.ops.rows import Repeat

_WRITERS = re.compile(
    r"(?:.+\.)?(?:o_proj|out_proj|down_proj|c_proj|w2|wo|fc2|fc_out|dense_4h_to_h|output_linear"
    r"|(?:self_attention|attention|attn|self_attn)\.(?:dense|proj)|ffn_out|attn_out)(?:\.weight|\.bias)?|(?:.+\.)?down_proj_bias|(?:mlp|self_attention\.experts)\.bias"
)
"""The last matrices of blocks, by what stands after the layer's number, and their biases: those of experts too."""
_NORM = re.compile(r"(?:.*\.)?(?:[a-z_]*norm[a-z_\d]*|ln_?\w*)\.(?:weight|bias)")
_FIRST = re.compile(r"fc\w*|w\d|(?:gate|up|in)_proj")
"""What a layer without modules for its blocks may hold beside the last matrices of blocks."""
_POST_NORMED = ("openai-gpt",)
_POST_NORMED_BY = {"do_layer_norm_before": False, "apply_residual_connection_post_layernorm": True}
"""Models whose residual is what a norm gave, by model_type and by settings: no layer of theirs can add nothing."""


def silenced(source: Checkpoint, prefix: str, layers: Collection[int]) -> Checkpoint:
    """`source` in which these layers of `prefix` write zeros: answers are what they are without them, to the bit.

    The residual passes through; RMS norms behind a block give zero for zero. Raises `UsageError` for a layer in which
    some block has no last matrix that is known, for quantised ones, and for models whose residual is normed.
    """
    _refuse_post_normed(source)
    tensors = dict(source.tensors)
    for layer in sorted(layers):
        start = f"{prefix}.{layer}."
        own = {name: name.removeprefix(start) for name in source if name.startswith(start)}
        blocks = {rest.partition(".")[0] for rest in own.values() if not _NORM.fullmatch(rest)}
        writers = {name: rest for name, rest in own.items() if _WRITERS.fullmatch(rest)}
        mute = {rest.partition(".")[0] for rest in writers.values()}
        lacking = sorted(block for block in blocks - mute if not _FIRST.fullmatch(block))
        if lacking or not writers:
            block = escape(f"{start}{lacking[0] if lacking else ''}")
            raise UsageError(
                f"{escape(source.name)}: cannot tell what {block} adds to the residual",
                hint="a copy without = repeats the layer; weightops edit fills tensors with zeros by name",
            )
        for name in writers:
            spec = source[name].spec
            if spec.dtype.is_packed or not spec.dtype.is_float or spec.dtype.bits < 16:
                raise UsageError(
                    f"{escape(name)} is {spec}, part of a quantised weight, which is not made zero",
                    hint="weightops dequantize makes plain weights of it",
                )
            tensors[name] = LazyTensor.make(Repeat(spec.dtype, spec.shape, bytes(spec.dtype.itemsize)))
    result = source.with_tensors(tensors)
    numbers = listed(list(map(str, sorted(layers))), 100)
    return result.did(f"layers {numbers} are silent: training usually freezes all others")


def _refuse_post_normed(source: Checkpoint) -> None:
    config = source.config()
    kind = str(config.get("model_type"))
    odd = next((key for key, value in _POST_NORMED_BY.items() if config.get(key) is value), None)
    if kind in _POST_NORMED or odd is not None:
        said = f"{odd} is {str(config[odd]).lower()}" if odd is not None else f"it is a {escape(kind)}"
        raise UsageError(
            f"{escape(source.name)}: norms lie in the residual ({said}), so that no layer leaves it as it was",
            hint="a copy without = repeats the layer",
        )
