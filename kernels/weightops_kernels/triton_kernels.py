"""The Triton kernels, as plain functions: `launch` compiles them or runs them in the interpreter.

All multiply `x [M, K]` with weights that `layout` has arranged. A weight enters the tensor cores as `q - zero`, an
exact integer in float16 and bfloat16; the sum over a block of K is then multiplied with the scales in float32. So no
weight is ever rounded, and float16 scales keep their bits beside bfloat16 inputs.

Only builtins of the language are called: `tl.zeros`, `tl.cdiv` and other functions that are themselves compiled cannot
run in the interpreter beside compiled kernels. That is why the two kernels begin and end with the same lines.

MODE says where a sum goes: 0 to the output, 1 added to a float32 output by atomics, 2 to `[split, M, N]` partial sums.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton.language as tl


def w4a16(
    x,
    words,
    steps,
    out,
    M,
    N,
    K,
    stride_xm,
    split_blocks,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BF16: tl.constexpr,
    SCALE_BF16: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Four bits, interleaved words. Grid: tiles of M and N, splits of K. GROUP: a multiple of 32, 0 for one group."""
    WORDS: tl.constexpr = BLOCK_K // 8
    PART: tl.constexpr = BLOCK_K // 4
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400
    BASE: tl.constexpr = 128 if BF16 else 1024
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    SCALE: tl.constexpr = tl.bfloat16 if SCALE_BF16 else tl.float16
    # Rows that share a scale: a block of K if groups are made of blocks, a group if blocks are made of groups, else 32.
    SPAN: tl.constexpr = BLOCK_K if GROUP % BLOCK_K == 0 else (GROUP if BLOCK_K % GROUP == 0 else PART)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    top = (tl.program_id(0) % tiles_m) * BLOCK_M
    lanes_m = tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (top + lanes_m < M)[:, None]
    col_ok = cols < N
    first = tl.program_id(1) * split_blocks
    last = tl.minimum(first + split_blocks, (K + BLOCK_K - 1) // BLOCK_K)
    inner = tl.arange(0, PART)
    x += top.to(tl.int64) * stride_xm
    x_at = lanes_m[:, None] * stride_xm + inner[None, :]
    words += first.to(tl.int64) * WORDS * N
    w_at = tl.arange(0, WORDS)[:, None] + cols[None, :] * WORDS
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for block in range(first, last):
        w = tl.load(words + w_at, mask=col_ok[None, :], other=0)
        words += WORDS * N
        for j in tl.static_range(4):
            start = block * BLOCK_K + j * PART
            if j * PART % SPAN == 0:
                group = 0
                if GROUP > 0:
                    group = tl.minimum(start, K - 1) // GROUP  # rows that only fill the block up are in no group
                step = tl.load(steps + group * N + cols, mask=col_ok, other=0)
                zero = step >> 16
                scale = (step & 0xFFFF).to(tl.int16).to(SCALE, bitcast=True).to(tl.float32)
                part = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
            if USE_ASM:
                offset = zero * 0x00010001 + MAGIC
                if BF16:
                    pair = tl.inline_asm_elementwise(
                        "{ .reg .b32 t; lop3.b32 t, $1, 0x000f000f, 0x43004300, 0xea;"
                        " .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, t, one, $2; }",
                        "=r,r,r",
                        [w >> (4 * j), (offset ^ -2147450880)[None, :]],
                        dtype=tl.int32,
                        is_pure=True,
                        pack=1,
                    )
                else:
                    pair = tl.inline_asm_elementwise(
                        "{ .reg .b32 t; lop3.b32 t, $1, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, t, $2; }",
                        "=r,r,r",
                        [w >> (4 * j), offset[None, :]],
                        dtype=tl.int32,
                        is_pure=True,
                        pack=1,
                    )
                even = (pair & 0xFFFF).to(tl.int16).to(FLOAT, bitcast=True)
                odd = (pair >> 16).to(tl.int16).to(FLOAT, bitcast=True)
            else:
                pair = ((w >> (4 * j)) & 0x000F000F) | MAGIC
                offset = (zero + BASE).to(FLOAT)[None, :]
                even = (pair & 0xFFFF).to(tl.int16).to(FLOAT, bitcast=True) - offset
                odd = (pair >> 16).to(tl.int16).to(FLOAT, bitcast=True) - offset
            weight = tl.join(even, odd).permute(0, 2, 1).reshape(PART, BLOCK_N)
            if EVEN_K:
                a = tl.load(x + start + x_at, mask=row_ok, other=0.0)
            else:
                a = tl.load(x + start + x_at, mask=row_ok & (start + inner < K)[None, :], other=0.0)
            part = tl.dot(a, weight, part)
            if (j + 1) * PART % SPAN == 0:
                acc += part * scale[None, :]
    out_at = out + top.to(tl.int64) * N + lanes_m[:, None] * N + cols[None, :]
    ok = row_ok & col_ok[None, :]
    if MODE == 0:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=ok)
    elif MODE == 1:
        tl.atomic_add(out_at, acc, mask=ok, sem="relaxed")
    else:
        tl.store(out_at + tl.program_id(1).to(tl.int64) * M * N, acc, mask=ok)


def wxa16(
    x,
    words,
    steps,
    chunk_group,
    out,
    M,
    N,
    K,
    stride_xm,
    split_blocks,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
    BF16: tl.constexpr,
    SCALE_BF16: tl.constexpr,
):
    """Any bits, words as the format packs them, any groups. Grid: tiles of M and N, splits of K in chunks of 32."""
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    SCALE: tl.constexpr = tl.bfloat16 if SCALE_BF16 else tl.float16
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    top = (tl.program_id(0) % tiles_m) * BLOCK_M
    lanes_m = tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (top + lanes_m < M)[:, None]
    col_ok = cols < N
    first = tl.program_id(1) * split_blocks
    last = tl.minimum(first + split_blocks, (K + 31) // 32)
    inner = tl.arange(0, 32)
    word = inner * BITS // 32
    shift = (inner * BITS % 32)[:, None]
    x += top.to(tl.int64) * stride_xm
    x_at = lanes_m[:, None] * stride_xm + inner[None, :]
    words += first.to(tl.int64) * BITS * N
    w_at = word[:, None] * N + cols[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for chunk in range(first, last):
        group = tl.load(chunk_group + chunk)
        step = tl.load(steps + group * N + cols, mask=col_ok, other=0)
        zero = step >> 16
        scale = (step & 0xFFFF).to(tl.int16).to(SCALE, bitcast=True).to(tl.float32)
        q = tl.load(words + w_at, mask=col_ok[None, :], other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        if BITS == 3:  # two values of 32 lie across words
            across = shift + BITS > 32
            rest = tl.load(words + N + w_at, mask=col_ok[None, :] & across, other=0).to(tl.uint32, bitcast=True)
            q = q | (rest << tl.where(across, 32 - shift, 0).to(tl.uint32))
        words += BITS * N
        weight = ((q & ((1 << BITS) - 1)).to(tl.int32) - zero[None, :]).to(FLOAT)
        a = tl.load(x + chunk * 32 + x_at, mask=row_ok & (chunk * 32 + inner < K)[None, :], other=0.0)
        acc += tl.dot(a, weight) * scale[None, :]
    out_at = out + top.to(tl.int64) * N + lanes_m[:, None] * N + cols[None, :]
    ok = row_ok & col_ok[None, :]
    if MODE == 0:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=ok)
    elif MODE == 1:
        tl.atomic_add(out_at, acc, mask=ok, sem="relaxed")
    else:
        tl.store(out_at + tl.program_id(1).to(tl.int64) * M * N, acc, mask=ok)


def dequantize_w4(
    words,
    steps,
    weight,
    N,
    K,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_BF16: tl.constexpr,
):
    """Interleaved words as weights `[K, N]` in the order of the layout's rows. Grid: tiles of N, blocks of K."""
    WORDS: tl.constexpr = BLOCK_K // 8
    PART: tl.constexpr = BLOCK_K // 4
    SCALE: tl.constexpr = tl.bfloat16 if SCALE_BF16 else tl.float16
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < N
    lanes = tl.arange(0, WORDS)
    block = tl.program_id(1)
    w_at = words + block.to(tl.int64) * WORDS * N + lanes[:, None] + cols[None, :] * WORDS
    w = tl.load(w_at, mask=col_ok[None, :], other=0)
    for j in tl.static_range(4):
        start = block * BLOCK_K + j * PART
        group = 0
        if GROUP > 0:
            group = tl.minimum(start, K - 1) // GROUP  # rows that only fill the block up are in no group
        step = tl.load(steps + group * N + cols, mask=col_ok, other=0)
        zero = step >> 16
        scale = (step & 0xFFFF).to(tl.int16).to(SCALE, bitcast=True).to(tl.float32)
        for half in tl.static_range(2):
            q = (w >> (4 * j + 16 * half)) & 15
            row = start + 2 * lanes + half
            value = (q - zero[None, :]).to(tl.float32) * scale[None, :]
            at = weight + row.to(tl.int64)[:, None] * N + cols[None, :]
            tl.store(at, value.to(weight.dtype.element_ty), mask=(row < K)[:, None] & col_ok[None, :])


def add_partials(partials, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """`partials [SPLITS, size]` added in order to `out [size]`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.full((BLOCK,), 0.0, tl.float32)
    for _ in range(SPLITS):
        acc += tl.load(partials + at, mask=at < size, other=0.0)
        partials += size
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)
