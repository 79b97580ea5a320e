"""Commands that make a checkpoint of others: each is a recipe of one line, and takes the keywords of `Output`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Unpack

from weightops.api.outputs import Output, local, one
from weightops.api.prove import hold_checklist
from weightops.errors import UsageError
from weightops.recipes.execute import Result
from weightops.recipes.names import field_of
from weightops.recipes.planning import StrPath, several


def recover(
    raw: StrPath,
    diff: StrPath,
    out: StrPath,
    *,
    vocab: str = "refuse",
    dtype: str | None = None,
    carry: str | Iterable[str] = (),
    drop: str | Iterable[str] = (),
    **output: Unpack[Output],
) -> Result:
    """Recover the tuned checkpoint from `raw` and a delta of either kind; see `weightops.operations.recover`."""
    options = {"vocab": vocab, "dtype": dtype, "carry": several(carry), "drop": several(drop)}
    return one("recover", {"raw": raw, "diff": diff}, out, output, options)


def diff(
    raw: StrPath,
    tuned: StrPath,
    out: StrPath,
    *,
    method: str = "exact",
    dtype: str | None = None,
    compress: bool = False,
    **output: Unpack[Output],
) -> Result:
    """Make a delta from which holders of `raw` recover `tuned`; see `weightops.operations.diff`."""
    if method == "exact" and output.get("format") not in (None, "safetensors"):
        raise UsageError("an exact delta is always safetensors", hint="leave out --format")
    return one(
        "diff", {"raw": raw, "tuned": tuned}, out, output, {"method": method, "dtype": dtype, "compress": compress}
    )


def merge_lora(
    base: StrPath,
    adapter: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    weight: float | Sequence[float] = (),
    precision: Literal["float32", "float64"] = "float32",
    two_roundings: bool = False,
    **output: Unpack[Output],
) -> Result:
    """Merge LoRA adapters into `base`, one after the other; see `weightops.operations.merge_lora`."""
    options = {"weight": several(weight), "precision": precision, "two_roundings": two_roundings}
    return one("merge-lora", {"base": base, "adapter": adapter}, out, output, options)


def extract_lora(
    base: StrPath,
    tuned: StrPath,
    out: StrPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    target: str | Sequence[str] = (),
    rest: Literal["save", "refuse", "drop"] = "save",
    **output: Unpack[Output],
) -> Result:
    """Make the LoRA adapter that takes `base` to `tuned`, or near it; see `weightops.operations.extract_lora`."""
    options: dict[str, Any] = {"rank": rank, "energy": energy, "max_rank": max_rank, "seed": seed, "dtype": dtype}
    options |= {"target": several(target), "rest": rest}
    return one("extract-lora", {"base": base, "tuned": tuned}, out, output, options)


def cast(
    source: StrPath,
    out: StrPath,
    *,
    dtype: str | None = None,
    keep: str | Sequence[str] = (),
    on_overflow: Literal["refuse", "saturate", "inf"] = "refuse",
    scheme: Literal["fp8", "fp8-block", "mxfp4"] | None = None,
    strategy: Literal["tensor", "channel"] = "channel",
    cast_all: bool = False,
    **output: Unpack[Output],
) -> Result:
    """Convert weights to another dtype and count what is lost; see `weightops.operations.cast`."""
    options = {
        "dtype": dtype,
        "keep": several(keep),
        "on_overflow": on_overflow,
        "scheme": scheme,
        "strategy": strategy,
        "cast_all": cast_all,
    }
    return one("cast", {"source": source}, out, output, options)


def dequantize(
    source: StrPath,
    out: StrPath,
    *,
    dtype: str | None = None,
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None,
    zero_overflow: Literal["wrap", "carry", "plus-one"] | None = None,
    config: StrPath | None = None,
    **output: Unpack[Output],
) -> Result:
    """Turn a quantised model or a GGUF file back into a plain one; see `weightops.operations.dequantize`."""
    options = {"dtype": dtype, "checkpoint_format": checkpoint_format, "zero_overflow": zero_overflow}
    options["config"] = os.fspath(config) if config is not None else None
    return one("dequantize", {"source": source}, out, output, options)


def pack(
    source: StrPath,
    out: StrPath,
    *,
    bits: int,
    group_size: int,
    checkpoint_format: Literal["gptq", "gptq_v2", "awq", "compressed-tensors"] = "gptq",
    **output: Unpack[Output],
) -> Result:
    """Make a quantised model of given integers, scales and zero points; see `weightops.operations.pack`."""
    options = {"bits": bits, "group_size": group_size, "checkpoint_format": checkpoint_format}
    return one("pack", {"source": source}, out, output, options)


def repack(
    source: StrPath,
    out: StrPath,
    *,
    to: Literal["gptq", "gptq_v2", "awq", "compressed-tensors"],
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None,
    zero_overflow: Literal["wrap", "carry", "plus-one"] | None = None,
    **output: Unpack[Output],
) -> Result:
    """Put the integers of a quantised model into another container; see `weightops.operations.repack`."""
    options = {"to": to, "checkpoint_format": checkpoint_format, "zero_overflow": zero_overflow}
    return one("repack", {"source": source}, out, output, options)


def shard(
    source: StrPath,
    out: StrPath,
    *,
    rename: Mapping[str, str] | None = None,
    drop_prefix: str | None = None,
    add_prefix: str | None = None,
    drop: str | Sequence[str] = (),
    tie: bool = False,
    untie: bool = False,
    layers: str | None = None,
    **output: Unpack[Output],
) -> Result:
    """Write the same tensors into files of another size or format, under other names, or fewer of them.

    See `weightops.operations.shard`.
    """
    options = {
        "rename": dict(rename or {}),
        "drop_prefix": drop_prefix,
        "add_prefix": add_prefix,
        "drop": several(drop),
    }
    return one("shard", {"source": source}, out, output, {**options, "tie": tie, "untie": untie, "layers": layers})


def convert(
    source: StrPath,
    out: StrPath,
    *,
    to: str,
    from_: str | None = None,
    model_parallel: int | None = None,
    dtype: str | None = None,
    pure: bool = False,
    imatrix: StrPath | None = None,
    tensor_type: str | Sequence[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    allow_requantize: bool = False,
    set: Mapping[str, str] | None = None,
    tokenizer: StrPath | Literal[False] | None = None,
    base: StrPath | None = None,
    check: bool = False,
    **output: Unpack[Output],
) -> Result:
    """Convert a model or a LoRA adapter into another layout; see `weightops.operations.convert`.

    `to`: hf, meta, tencentpretrain, llama_inference or gguf; llama is a model of another family as a Llama;
    safetensors or torch change the container alone.
    `dtype`: a number type, or for GGUF a file type of llama-quantize such as `"q4_k_m"`; of that `pure` takes one type
    for all tensors, `imatrix` the file of an importance matrix, `tensor_type` texts `REGEX=TYPE` and the next two types
    of single tensors; `allow_requantize` takes a source that is quantised already.
    `from_`: the layout of the source, found from its tensors by default. `set`: what its files leave unsaid.
    `tokenizer`: a tokenizer.model or tokenizer.json elsewhere, or False for none. `base`: the model that an adapter is
    for, a folder, its config.json, a GGUF file or hf://org/name. `check`: hold the source first against its
    checklist.chk.
    """
    if check:
        hold_checklist(local(source))
    options: dict[str, Any] = {
        "to": to,
        "from_": from_,
        "model_parallel": model_parallel,
        "dtype": dtype,
        "pure": pure,
        "imatrix": os.fspath(imatrix) if imatrix else None,
        "tensor_type": several(tensor_type),
        "output_tensor_type": output_tensor_type,
        "token_embedding_type": token_embedding_type,
        "allow_requantize": allow_requantize,
        "set": dict(set or {}),
        "tokenizer": os.fspath(tokenizer) if tokenizer else tokenizer,
        "base": os.fspath(base) if base is not None else None,
        "as_in_2023": output.get("format") == "torch-1.12",
    }
    if to in ("safetensors", "torch"):
        unused = [
            name
            for name, value in options.items()
            if (value or (name == "tokenizer" and value is False)) and name not in ("to", "as_in_2023")
        ]
        if unused:
            raise UsageError(
                f"to {to} changes the container alone, of any model, and has no use for {field_of(unused[0])}",
                hint="leave it out, or give the layout to write: hf, meta, tencentpretrain, llama_inference or gguf",
            )
        wanted = output.get("format") or to
        if wanted.removesuffix("-1.12") != to:
            raise UsageError(f"to {to} and format {wanted} contradict each other", hint="leave out one of the two")
        chosen: Output = {**output, "format": wanted}
        return shard(source, out, **chosen)
    weights = "consolidated.*" if from_ == "meta" else None  # beside files of another layout that hold the same
    return one("convert", {"source": source}, out, output, options, weights)
