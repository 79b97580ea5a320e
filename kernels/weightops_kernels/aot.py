"""Compile the kernels for GPUs that are not at hand, and read what they will use from the result.

Needs Triton, no GPU: it brings ptxas, cuobjdump and nvdisasm along. `python -m weightops_kernels.aot` prints a table.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightops_kernels.configs import SEEDS
from weightops_kernels.layout import BLOCK_K

SHARED_NBYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one block may take, by compute capability (CUDA C programming guide, compute capabilities)."""


@dataclass(frozen=True)
class Compiled:
    """What one kernel uses on one architecture."""

    registers: int
    stack_nbytes: int
    """Above zero where registers spill."""
    shared_nbytes: int
    instructions: int
    """Instructions in the innermost loop that multiplies matrices."""
    tensor_instructions: int
    """Those of them that multiply matrices."""
    per_weight: float
    """Thread instructions for one weight in that loop."""


def compile_w4a16(
    capability: int,
    block_m: int = 16,
    block_n: int = 128,
    num_warps: int = 4,
    num_stages: int = 4,
    group_size: int = 128,
    bf16: bool = False,
    mode: int = 2,
    even_k: bool = True,
) -> Compiled:
    """The four-bit kernel compiled for a compute capability (80, 86, 89, 90, 100)."""
    kind = "*bf16" if bf16 else "*fp16"
    out = "*fp32" if mode else kind
    signature = {"x": kind, "words": "*i32", "steps": "*i32", "out": out}
    signature |= dict.fromkeys(("M", "N", "K", "stride_xm", "split_blocks"), "i32")
    constants = {
        "GROUP": group_size, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": BLOCK_K,
        "MODE": mode, "EVEN_K": even_k, "BF16": bf16, "SCALE_BF16": False, "USE_ASM": True,
    }  # fmt: skip
    made = _compile("w4a16", signature, constants, ("split_blocks", "M"), capability, num_warps, num_stages)
    return _measure(made, BLOCK_K * block_n, num_warps)


def compile_wxa16(capability: int, bits: int, block_m: int = 16, block_n: int = 128, bf16: bool = False) -> Compiled:
    """The plain kernel compiled likewise."""
    kind = "*bf16" if bf16 else "*fp16"
    signature = {"x": kind, "words": "*i32", "steps": "*i32", "chunk_group": "*i32", "out": "*fp32"}
    signature |= dict.fromkeys(("M", "N", "K", "stride_xm", "split_blocks"), "i32")
    constants = {"BITS": bits, "BLOCK_M": block_m, "BLOCK_N": block_n, "MODE": 2, "BF16": bf16, "SCALE_BF16": False}
    made = _compile("wxa16", signature, constants, ("split_blocks", "M"), capability, 4, 3)
    return _measure(made, 32 * block_n, 4)


def _compile(
    name: str,
    signature: dict[str, str],
    constants: Mapping[str, object],
    undivided: tuple[str, ...],
    capability: int,
    num_warps: int,
    num_stages: int,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from weightops_kernels import triton_kernels

    attributes = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(signature) if key not in undivided}
    source = ASTSource(
        JITFunction(getattr(triton_kernels, name)),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=dict(constants),
        attrs=attributes,
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _measure(made: Any, weights: int, num_warps: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        loop = main_loop(_tool("nvdisasm", "-c", str(cubin)))
    # a format that is not cuobjdump's is an error all the same
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))  # type: ignore[union-attr]
    tensor = sum("MMA" in line for line in loop)
    per_weight = len(loop) * num_warps * 32 / weights
    return Compiled(registers, stack, int(made.metadata.shared), len(loop), tensor, per_weight)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*\(\.(L_x_\d+)\)")


def main_loop(sass: str) -> list[str]:
    """The instructions of the shortest loop (backward branch) that holds most of the matrix instructions."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)[1:]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found.group(1))
            if (branch := _BRANCH.search(line)) and branch.group(1) in labels:
                loops.append(instructions[labels[branch.group(1)] :])
    loops = [loop for loop in loops if any("MMA" in text for text in loop)]
    if not loops:
        raise ValueError("No loop of the compiled kernel multiplies matrices.")
    return max(loops, key=lambda loop: (sum("MMA" in text for text in loop), -len(loop)))


def main() -> None:
    """Print what every seed uses on every architecture."""
    write = sys.stdout.write
    write("arch  tile     warps stages  registers  stack  shared KiB  instructions per weight\n")
    for capability in (80, 86, 90):
        for _, block_m, block_n, warps, stages, _ in SEEDS:
            found = compile_w4a16(capability, block_m, block_n, warps, stages)
            write(
                f"sm_{capability} {block_m:3}x{block_n:<4} {warps:5} {stages:6} {found.registers:10} "
                f"{found.stack_nbytes:6} {found.shared_nbytes / 1024:11.1f} {found.per_weight:9.2f}\n"
            )


if __name__ == "__main__":
    main()
