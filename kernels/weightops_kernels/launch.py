"""Run the Triton kernels: compiled on a GPU, or in Triton's interpreter for tensors on the CPU (tests; slow).

One source serves both: the functions of `triton_kernels` are wrapped twice, without an environment variable. Checked
with Triton 3.6 to 3.9; the interpreter needs 3.7.1 beside numpy 2.4.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from weightops_kernels import configs
from weightops_kernels.configs import Config
from weightops_kernels.layout import BLOCK_K, CHUNK, Repacked

FLOATS = (torch.float16, torch.bfloat16)


@functools.cache
def available() -> str | None:
    """None if Triton can be imported, else why it cannot."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton==3.7.1"
    return None


@functools.cache
def _kernel(name: str, interpret: bool) -> Any:
    if reason := available():
        raise RuntimeError(reason)
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from weightops_kernels import triton_kernels

    function = getattr(triton_kernels, name)
    return InterpretedFunction(function) if interpret else JITFunction(function)


@functools.cache
def _device(index: int) -> tuple[str, int]:
    found = torch.cuda.get_device_properties(index)
    return found.name, found.multi_processor_count


def choose(x: Tensor, weight: Repacked) -> Config:
    """The config for `x [M, K]` on its device."""
    m, n = x.shape[0], weight.out_features
    name, count = _device(x.device.index) if x.is_cuda else ("interpreter", 4)
    config = configs.choose(name, m, n, weight.in_features, weight.group_size, count)
    if config.dequantize and not weight.interleaved:
        return configs.seed(configs.DEQUANTIZE_FROM - 1, n, weight.kernel_rows, count)
    return config


def matmul(
    x: Tensor,
    weight: Repacked,
    config: Config | None = None,
    deterministic: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`x [M, K]` times a repacked weight, `[M, N]` in the type of `x`, or of `out` (float16, bfloat16, float32).

    Sums in float32. `deterministic` gives the same bits in every run. On a CPU the interpreter runs: float16 only.
    Raises ValueError for another type or width of `x`, RuntimeError where Triton is missing.
    """
    if x.ndim != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x must be [M, {weight.in_features}]; found {list(x.shape)}.")
    if x.dtype not in FLOATS or (x.dtype == torch.bfloat16 and not x.is_cuda):
        can = "float16 or bfloat16" if x.is_cuda else "float16 (the interpreter computes bfloat16 wrongly)"
        raise ValueError(f"x must be {can}; found {str(x.dtype).removeprefix('torch.')}.")
    m, n = x.shape[0], weight.out_features
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    elif list(out.shape) != [m, n] or not out.is_contiguous():
        raise ValueError(f"out must be contiguous [{m}, {n}]; found {list(out.shape)} with strides {out.stride()}.")
    if m == 0 or n == 0 or weight.in_features == 0:
        return out.zero_()
    config = config or choose(x, weight)
    if deterministic:
        config = config.deterministic()
    x = weight.arrange(x)
    if config.dequantize:
        return out.copy_(x @ dequantize(weight, x.dtype))
    return _split(x, weight, config, out)


def _split(x: Tensor, weight: Repacked, config: Config, out: Tensor) -> Tensor:
    m, n = out.shape
    k = weight.kernel_rows
    blocks = -(-k // (BLOCK_K if weight.interleaved else CHUNK))
    per_split = -(-blocks // min(config.split_k, blocks))
    splits = -(-blocks // per_split)
    if splits == 1:
        mode, to = 0, out
    elif config.reduction == "atomic":
        mode, to = 1, torch.zeros(m, n, dtype=torch.float32, device=x.device)
    else:
        mode, to = 2, torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    grid = (-(-m // config.block_m) * -(-n // config.block_n), splits)
    interpret = not x.is_cuda
    options = {} if interpret else {"num_warps": config.num_warps, "num_stages": config.num_stages}
    common = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "MODE": mode,
        "BF16": x.dtype == torch.bfloat16, "SCALE_BF16": weight.scale_dtype == torch.bfloat16,
    }  # fmt: skip
    shape = (m, n, k, x.stride(0), per_split)
    if weight.interleaved:
        _kernel("w4a16", interpret)[grid](
            x, weight.words, weight.steps, to, *shape,
            GROUP=weight.group_size, BLOCK_K=BLOCK_K, EVEN_K=k % BLOCK_K == 0,
            USE_ASM=not interpret and torch.version.hip is None, **common, **options,
        )  # fmt: skip
    else:
        _kernel("wxa16", interpret)[grid](
            x, weight.words, weight.steps, weight.chunk_group, to, *shape,
            BITS=weight.bits, **common, **options,
        )  # fmt: skip
    if mode == 1:
        out.copy_(to)
    elif mode == 2:
        size, block = m * n, 1024
        _kernel("add_partials", interpret)[(-(-size // block),)](to, out, size, SPLITS=splits, BLOCK=block)
    return out


def dequantize(weight: Repacked, dtype: torch.dtype) -> Tensor:
    """The weight `[K, N]` of an interleaved layer, its rows in the layout's order, each value rounded once."""
    k, n = weight.in_features, weight.out_features
    out = torch.empty(k, n, dtype=dtype, device=weight.words.device)
    block_n = 256
    grid = (-(-n // block_n), -(-k // BLOCK_K))
    _kernel("dequantize_w4", not out.is_cuda)[grid](
        weight.words, weight.steps, out, n, k,
        GROUP=weight.group_size, BLOCK_N=block_n, BLOCK_K=BLOCK_K, SCALE_BF16=weight.scale_dtype == torch.bfloat16,
    )  # fmt: skip
    return out
