"""The kernel's inline assembly, run by a few lines of numpy where there is no GPU.

Triton's interpreter refuses inline assembly. Here it is given an evaluator of the four instructions that the kernel
uses, so the very text that a GPU would run is held against float64, operands and constants included.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from gptq_layers import random_layer, random_x, relative_error
from weightops_kernels import launch, layout

pytestmark = pytest.mark.skipif(launch.available() is not None, reason=str(launch.available()))


def halves(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The two 16-bit floats of each word, float32 `[..., 2]`."""
    return torch.from_numpy(words.copy()).view(dtype).view(*words.shape, 2).float()


def run(assembly: str, arguments: list[np.ndarray]) -> np.ndarray:
    """`$0` of straight-line PTX with one output; `arguments` are `$1`, `$2` and so on, uint32."""
    shape = np.broadcast_shapes(*(a.shape for a in arguments))
    registers = {f"${i + 1}": np.broadcast_to(a, shape) for i, a in enumerate(arguments)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full(shape, int(name, 16), np.uint32)

    for line in filter(None, (part.strip() for part in assembly.strip(" {}").split(";"))):
        instruction, _, operands = line.partition(" ")
        if instruction == ".reg":
            continue
        target, *names = re.split(r",\s*", operands)
        if instruction == "lop3.b32":
            a, b, c = (value(name) for name in names[:3])
            table = int(names[3], 16)
            minterms = [(i, (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)) for i in range(8)]
            registers[target] = sum((m for i, m in minterms if table >> i & 1), np.zeros(shape, np.uint32))
        elif instruction == "mov.b32":
            registers[target] = value(names[0])
        elif instruction == "sub.f16x2":
            a, b = (halves(value(name), torch.float16) for name in names)
            registers[target] = (a - b).half().view(torch.int32)[..., 0].numpy().view(np.uint32)
        elif instruction == "fma.rn.bf16x2":
            a, b, c = (halves(value(name), torch.bfloat16) for name in names)
            registers[target] = (a * b + c).bfloat16().view(torch.int32)[..., 0].numpy().view(np.uint32)
        else:
            raise NotImplementedError(instruction)
    return registers["$0"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The assembly that ran."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    texts: list[str] = []

    def create_inline_asm(
        _: Any, assembly: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
    ) -> Any:
        texts.append(assembly)
        result = run(assembly, [np.asarray(v.data).view(np.uint32) for v in values])
        handle = TensorHandle(result.view(np.int32), values[0].dtype)
        return type("Call", (), {"get_result": lambda self, i: handle})()

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    return texts


def test_the_assembly_multiplies_like_float64(seen: list[str]) -> None:
    layer, x = random_layer(256, 64, 64), random_x(3, 256)
    weight = layout.repack(layer.packed)
    out = torch.full((3, 64), torch.nan)
    launch._kernel("w4a16", True)[(1, 1)](
        x, weight.words, weight.steps, out, 3, 64, 256, 256, 2, GROUP=64, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128,
        MODE=0, EVEN_K=True, BF16=False, SCALE_BF16=False, USE_ASM=True,
    )  # fmt: skip
    assert "sub.f16x2" in seen[0]
    assert relative_error(out, x.double() @ layer.weight()) < 1e-6


def test_the_assembly_for_bfloat16_makes_exact_integers() -> None:
    """The interpreter cannot multiply bfloat16; so the assembly alone, over all values and zero points."""
    text = inspect.getsource(launch._kernel("w4a16", True).fn)
    strings = re.findall(r'"(.*?)"', text[text.index("if BF16:\n") :])
    end = next(i for i, s in enumerate(strings) if s.endswith("}"))
    assembly = "".join(strings[: end + 1])
    assert "fma.rn.bf16x2" in assembly
    assert str(np.uint32(0x80008000).view(np.int32)) in text, "the kernel flips the signs of the offset"
    q, zero = np.meshgrid(np.arange(16, dtype=np.uint32), np.arange(16, dtype=np.uint32))
    words = q | (15 - q) << 16 | np.uint32(0xFFF0FFF0)  # neighbours that the mask must drop
    offset = (zero * np.uint32(0x00010001) + np.uint32(0x43004300)) ^ np.uint32(0x80008000)
    found = halves(run(assembly, [words, offset]).view(np.int32), torch.bfloat16).numpy()
    assert np.array_equal(found[..., 0], q.astype(np.int64) - zero)
    assert np.array_equal(found[..., 1], 15 - q.astype(np.int64) - zero)
