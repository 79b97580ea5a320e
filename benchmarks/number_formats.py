"""Dequantising a whole model, against the disk; and the arithmetic alone, against the formats' own libraries.

`make bench-formats`. Models of random codes and scales in each format's layout: what numbers they are makes no
difference. Whole commands by turns with `cat` of the input, `cp` of as many bytes as are written, and `sync`. The
arithmetic is one thread in memory, in processor seconds per GB of output; libraries that are not there are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bench import files, ratio, write_section
from family import SHAPES, Shape
from side import Side

from weightops.formats.gguf import gguf_layout
from weightops.formats.layout import Data
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.ggml.values import BlockValues
from weightops.ops.numbers.affine import Affine, ScalesOverOne
from weightops.ops.numbers.codes import Codes
from weightops.ops.rows import Given
from weightops.spec import DType, TensorSpec

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ROOT / ".venv-formats/bin/python"
GROUP = 128
Part = tuple[str, str, tuple[int, ...], Callable[[int], bytes]]
"""A tensor: its name, its type in safetensors, its shape, and the bytes of so many elements."""
RANDOM = np.random.default_rng(0)
POOL = RANDOM.integers(0, 256, 1 << 24, dtype=np.uint8)


def codes(nbytes: int) -> bytes:
    at = int(RANDOM.integers(0, len(POOL) // 2))
    return np.resize(POOL[at:], nbytes).tobytes()


def fp8_codes(nbytes: int) -> bytes:
    return (np.frombuffer(codes(nbytes), np.uint8) & 0xF7).tobytes()  # none of which is a NaN


def floats(count: int) -> bytes:
    return np.resize(RANDOM.random(4096, dtype=np.float32) * 0.01 + 0.001, count).tobytes()


def bfloats(count: int) -> bytes:
    return (np.frombuffer(floats(count), np.uint32) >> 16).astype("<u2").tobytes()


def fp8_block(name: str, rows: int, columns: int) -> Iterator[Part]:
    grid = (-(-rows // 128), -(-columns // 128))
    yield name, "F8_E4M3", (rows, columns), fp8_codes
    yield f"{name}_scale_inv", "F32", grid, floats


def w4(name: str, rows: int, columns: int) -> Iterator[Part]:
    stem = name.removesuffix(".weight")
    yield f"{stem}.weight_packed", "I32", (rows, columns // 8), lambda n: codes(4 * n)
    yield f"{stem}.weight_scale", "BF16", (rows, columns // GROUP), bfloats
    yield f"{stem}.weight_shape", "I64", (2,), lambda _: np.array([rows, columns]).tobytes()


def nvfp4(name: str, rows: int, columns: int) -> Iterator[Part]:
    stem = name.removesuffix(".weight")
    yield f"{stem}.weight_packed", "U8", (rows, columns // 2), codes
    yield (
        f"{stem}.weight_scale",
        "F8_E4M3",
        (rows, columns // 16),
        lambda n: (np.frombuffer(codes(n), np.uint8) & 0x77).tobytes(),
    )
    yield f"{stem}.weight_global_scale", "F32", (1,), floats


def nf4(name: str, rows: int, columns: int) -> Iterator[Part]:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    text = json.dumps(state).encode()
    yield name, "U8", (rows * columns // 2, 1), codes
    yield f"{name}.absmax", "F32", (rows * columns // 64,), floats
    yield f"{name}.quant_map", "F32", (16,), lambda _: np.linspace(-1, 1, 16, dtype=np.float32).tobytes()
    yield f"{name}.quant_state.bitsandbytes__nf4", "U8", (len(text),), lambda _: text


FORMATS: dict[str, tuple[Callable[[str, int, int], Iterator[Part]], dict[str, object]]] = {
    "fp8, 128 x 128": (fp8_block, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "int4, groups of 128": (
        w4,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    ),
    "nvfp4": (nvfp4, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}
BLOCKS = {"GGUF Q4_K": DType.Q4_K, "GGUF Q6_K": DType.Q6_K}
SIZES = {"F8_E4M3": 1, "U8": 1, "F32": 4, "I32": 4, "BF16": 2, "I64": 8}


def make_safetensors(shape: Shape, kind: str, folder: Path) -> None:
    """A model in a format: linear layers quantised, the rest in bfloat16."""
    make, quantization = FORMATS[kind]
    parts: list[Part] = []
    for name, size in shape.tensors():
        if "_proj" in name:
            parts += make(name, *size)
        else:
            parts.append((name, "BF16", size, bfloats))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, size, _ in parts:
        nbytes = int(np.prod(size)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, size, data in parts:
            file.write(data(int(np.prod(size))))
    config = {**shape.config(), "torch_dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def blocks(dtype: DType, count: int) -> bytes:
    """So many blocks of a K type, whose scales are small numbers."""
    size = dtype.block[1]
    made = np.frombuffer(codes(count * size), np.uint8).reshape(count, size).copy()
    places = (0, 2) if dtype is DType.Q4_K else (size - 2,)
    for place in places:
        made[:, place : place + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return made.tobytes()


def make_gguf(shape: Shape, dtype: DType, folder: Path) -> None:
    """A file of matrices of one type, under names that say nothing."""
    specs = [
        (f"blk.{i}.weight", TensorSpec(dtype if len(size) > 1 else DType.F32, size))
        for i, (_, size) in enumerate(shape.tensors())
    ]
    layout = gguf_layout(specs, {"general.architecture": {"string": "llama"}})
    known = dict(specs)
    folder.mkdir(parents=True)
    with (folder / "model.gguf").open("wb") as file:
        for piece in layout.pieces:
            if not isinstance(piece, Data):
                file.write(piece.data)  # type: ignore[union-attr]  # GGUF has no late pieces
                continue
            spec = known[piece.name]
            file.write(floats(spec.numel) if spec.dtype is DType.F32 else blocks(dtype, spec.nbytes // dtype.block[1]))


def whole(kind: str, shape: Shape, folder: Path, runs: int) -> str:
    """A row of the first table."""
    source, out, scratch = folder / "source", folder / "out", folder / "copy"
    shutil.rmtree(source, ignore_errors=True)
    if kind in FORMATS:
        make_safetensors(shape, kind, source)
    else:
        make_gguf(shape, BLOCKS[kind], source)
    paths = [path for path in source.iterdir() if path.suffix in (".gguf", ".safetensors")]
    ours, disk = Side(), Side()
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        argument = paths[0] if kind in BLOCKS else source
        ours.run([sys.executable, "-P", "-m", "weightops", "dequantize", str(argument), "--out", str(out), "--quiet"])
        shutil.rmtree(scratch, ignore_errors=True)
        copies = " ".join(map(str, files([out])))
        disk.run(["sh", "-c", f"cat {' '.join(map(str, paths))} > /dev/null; mkdir {scratch}; cp {copies} {scratch}/"])
    nbytes = sum(path.stat().st_size for path in files([out]))
    for path in (source, out, scratch):
        shutil.rmtree(path)
    median = statistics.median
    cells = [kind, f"{nbytes / 1e9:.2f}", f"{median(ours.wall_s):.1f}", f"{median(ours.processor_s):.1f}"]
    cells += [f"{max(ours.rss_anon_mb):.0f}", ratio(ours.wall_s, disk.wall_s)]
    return f"| {' | '.join(cells)} |"


def lazy(dtype: DType, shape: tuple[int, ...], data: bytes) -> LazyTensor:
    return LazyTensor.make(Given(dtype, shape, data))


def arithmetic() -> Iterator[tuple[str, LazyTensor]]:
    """One matrix of 2048 x 4096 in each format, computed from memory."""
    rows, columns = 2048, 4096
    count = rows * columns
    wide = DType.BF16
    eight = lazy(DType.F8_E4M3, (rows, columns), fp8_codes(count))
    four = lazy(DType.I32, (rows, columns // 8), codes(count // 2))
    bytes_ = lazy(DType.U8, (rows, columns // 2), codes(count // 2))
    flat = lazy(DType.U8, (1, count // 2), codes(count // 2))
    grid = lazy(DType.F32, (rows // 128, columns // 128), floats(count // 128 // 128))
    yield "fp8, 128 x 128", LazyTensor.make(Affine("w", wide, (128, 128)), eight, grid)
    scales = lazy(DType.BF16, (rows, columns // GROUP), bfloats(count // GROUP))
    yield (
        "int4, groups of 128",
        LazyTensor.make(Affine("w", wide, (1, GROUP), offset=8), LazyTensor.make(Codes(4, columns), four), scales),
    )
    small = lazy(DType.F8_E4M3, (rows, columns // 16), (np.frombuffer(codes(count // 16), np.uint8) & 0x77).tobytes())
    factors = LazyTensor.make(ScalesOverOne("w"), small, lazy(DType.F32, (1,), floats(1)))
    nibbles = LazyTensor.make(Codes(4, columns), bytes_)
    yield "nvfp4", LazyTensor.make(Affine("w", wide, (1, 16), table="e2m1"), nibbles, factors)
    exponents = lazy(DType.F8_E8M0, (rows, columns // 32), bytes([120]) * (count // 32))
    yield "mxfp4", LazyTensor.make(Affine("w", wide, (1, 32), table="e2m1"), nibbles, exponents)
    table = lazy(DType.F32, (16,), np.linspace(-1, 1, 16, dtype=np.float32).tobytes())
    absmax = lazy(DType.F32, (1, count // 64), floats(count // 64))
    stream = LazyTensor.make(Codes(4, count, "high"), flat)
    yield "nf4", LazyTensor.make(Affine("w", wide, (1, 64), ("map",)), stream, absmax, table)
    for name, dtype in BLOCKS.items():
        stored = lazy(dtype, (rows, columns), blocks(dtype, count // 256))
        yield f"{name}, float32", LazyTensor.make(BlockValues(), stored)


def computed(tensor: LazyTensor, runs: int) -> float:
    """Processor seconds per GB of output, the least of some runs."""
    out = memoryview(bytearray(tensor.nbytes))
    block = max(1, (4 << 20) // tensor.grain) * tensor.grain
    best = float("inf")
    for _ in range(runs):
        with Evaluator() as read:
            start = time.thread_time()
            for at in range(0, len(out), block):
                read(tensor, at, out[at : at + block])
            best = min(best, time.thread_time() - start)
    return best / len(out) * 1e9


def libraries(runs: int) -> dict[str, float]:
    """The same of the libraries, those that `make formats` has installed, in a process of theirs."""
    python = LIBRARIES if LIBRARIES.exists() else Path(sys.executable)
    script = Path(__file__).with_name("number_formats_libraries.py")
    done = subprocess.run([str(python), str(script), str(runs)], capture_output=True, text=True, check=True)
    return {str(k): float(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", choices=SHAPES, default="3b")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-formats"), help="takes 20 GB")
    parser.add_argument("--only", action="append", choices=(*FORMATS, *BLOCKS))
    parser.add_argument("--arithmetic", action="store_true", help="the second table alone, and nothing is written")
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    theirs = libraries(options.runs)
    second = []
    for name, tensor in arithmetic():
        ours, peer = computed(tensor, options.runs), theirs.get(name)
        second.append(f"| {name} | {ours:.2f} | {f'{peer:.2f} | {peer / ours:.1f}' if peer else ' | '} |")
        print(second[-1], flush=True)
    if options.arithmetic:
        return
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    first = []
    for kind in options.only or (*FORMATS, *BLOCKS):
        first.append(whole(kind, SHAPES[options.size], folder, options.runs))
        print(first[-1], flush=True)
    shutil.rmtree(folder)
    lines = [
        "## Number formats",
        "",
        f"Written by `make bench-formats`: `dequantize` of {options.size} parameters, {options.runs} runs by",
        "turns with `cat` of the input, `cp` of as many bytes as are written, and `sync`.",
        "",
        "| format | GB written | wall, s | processor, s | RssAnon, MB | wall / disk's |",
        "|---|---|---|---|---|---|",
        *first,
        "",
        "The arithmetic alone, one thread in memory, processor seconds per GB of output (bfloat16, of GGUF float32),",
        "beside the formats' own libraries on the same matrix: compressed-tensors 0.20, transformers 5.23 (of fp8 and",
        "mxfp4), bitsandbytes 0.50 and gguf 0.19.",
        "",
        "| format | weightops | library | library / ours |",
        "|---|---|---|---|",
        *second,
    ]
    write_section(options.report, "formats", lines)


if __name__ == "__main__":
    main()
