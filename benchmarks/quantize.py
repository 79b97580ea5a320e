"""Speed of quantize against gptqmodel on the same data, and its memory: `make bench-quantize`.

Whole processes by turns, on the trained small model and on one of 1.1B parameters' shape; and the same without what
comes before the first block, which for both is mostly importing transformers: ours `quantize --dry-run`, theirs until
the model is loaded. Memory on one of 3.0B parameters' shape, against what one block, its Hessians and 1 GiB take.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench import WEIGHTOPS, timed, write_section
from family import SHAPES, Shape, make

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data/tiny-llama"
PEER = ROOT / ".venv-gptqmodel/bin/python"
SAMPLES, SEQ_LEN = 16, 256
SCRIPT = """
import sys
import time
begin = time.perf_counter()
import torch
from gptqmodel import GPTQModel, QuantizeConfig

source, out, windows = sys.argv[1:]
config = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, damp_percent=0.01, device="cpu",
                        offload_to_disk=False)
model = GPTQModel.load(source, config)
examples = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in torch.load(windows)]
print("loaded", time.perf_counter() - begin)
model.quantize(examples, batch_size=8)
model.save(out)
"""


def shape_of(size: str) -> Shape:
    """`1b` is the whole shape, `1b:4` four of its blocks."""
    name, _, layers = size.partition(":")
    return replace(SHAPES[name], layers=int(layers)) if layers else SHAPES[name]


def shown(size: str) -> str:
    if size == "tiny":
        return "the small LLaMA"
    name = size.partition(":")[0]
    return f"{name} shape, {shape_of(size).layers} of {SHAPES[name].layers} blocks"


def model_of(size: str, folder: Path) -> Path:
    """The folder of a model, with the small model's tokenizer."""
    if size == "tiny":
        return DATA
    raw = folder / size.replace(":", "-") / "raw"
    if not (raw / "config.json").exists():
        make(shape_of(size), raw.parent)
        shutil.rmtree(raw.parent / "tuned", ignore_errors=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / name, raw / name)
    return raw


def ours(source: Path, out: Path, *more: str) -> list[str]:
    data = ("--calibration", str(DATA / "calibration.txt"), "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN))
    fixed = ("--device", "cpu", "--quiet", "--restart")
    return [WEIGHTOPS, "quantize", str(source), "--out", str(out), *data, *fixed, *more]


def save_windows(source: Path, path: Path) -> Path:
    import torch

    from weightops import open_checkpoint
    from weightops.inference.tokens import load_tokenizer
    from weightops.quantization.calibration import calibrate, read_texts

    tokenizer = load_tokenizer(open_checkpoint(source))
    torch.save(calibrate(tokenizer, read_texts([DATA / "calibration.txt"]), SAMPLES, SEQ_LEN, 0).tokens, path)
    return path


def against_gptqmodel(size: str, folder: Path, runs: int) -> str:
    source, out = model_of(size, folder), folder / "out"
    windows = save_windows(source, folder / "windows.pt")
    seconds: tuple[list[float], list[float]] = ([], [])
    theirs = [
        "env",
        "-C",
        str(folder),
        "GPTQMODEL_CPU_WORKERS=2",
        str(PEER),
        "-c",
        SCRIPT,
        str(source),
        str(out),
        str(windows),
    ]
    starts: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        starts[0].append(timed(ours(source, out, "--no-mse", "--dry-run"))[0])
        shutil.rmtree(out, ignore_errors=True)
        seconds[0].append(timed(ours(source, out, "--no-mse"))[0])
        shutil.rmtree(out, ignore_errors=True)
        begin = time.perf_counter()
        done = subprocess.run(theirs, capture_output=True, text=True, check=True)
        os.sync()
        seconds[1].append(time.perf_counter() - begin)
        starts[1].append(float(done.stdout.rpartition("loaded ")[2].split()[0]))
    cells = [shown(size)]
    for taken in (seconds, [[a - b for a, b in zip(*side, strict=True)] for side in zip(seconds, starts, strict=True)]):
        ratios = [b / a for a, b in zip(*taken, strict=True)]
        cells += [f"{statistics.median(side):.1f}" for side in taken]
        cells.append(f"**{statistics.median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})")
    return f"| {' | '.join(cells)} |"


def memory(size: str, folder: Path) -> list[str]:
    source, out = model_of(size, folder), folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shape = shape_of(size)
    block = sum(a * b for name, (a, b) in _matrices(size) if name.startswith("model.layers.0.")) * 4 / 1e6
    hessians = 3 * shape.ffn**2 * 4 / 1e6
    limit = block + hessians + (1 << 30) / 1e6 + SAMPLES * SEQ_LEN * shape.hidden * 4 / 1e6
    elapsed_s, peak_mb = timed(ours(source, out, "--max-memory", f"{limit:.0f}MB"))
    return [
        f"Memory, {shown(size)}, {SAMPLES} samples of {SEQ_LEN} tokens, clipping searched, {elapsed_s:.0f} s: "
        f"**{peak_mb:.0f} MB** RssAnon with `--max-memory {limit:.0f}MB`. One block in float32 ({block:.0f} MB), three "
        f"Hessians of the widest layer ({hessians:.0f} MB), hidden states and 1 GiB would be {limit:.0f} MB.",
    ]


def _matrices(size: str) -> list[tuple[str, tuple[int, int]]]:
    return [(name, (s[0], s[1])) for name, s in shape_of(size).tensors() if len(s) == 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,1b:4")
    parser.add_argument("--memory", default="3b:2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "## Quantising",
        "",
        f"Written by `make bench-quantize`: 4 bits, groups of 128, symmetric, {SAMPLES} samples of {SEQ_LEN} tokens, "
        f"no search for clipping on either side, {options.runs} runs of each by turns, CPU.",
        "",
        "| model | seconds | gptqmodel 7.7 | times as fast | without start-up | gptqmodel 7.7 | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    if not PEER.exists():
        sys.exit("`make gptqmodel` first")
    for size in filter(None, options.sizes.split(",")):
        lines.append(against_gptqmodel(size, options.folder, options.runs))
        print(lines[-1], flush=True)
    for size in filter(None, options.memory.split(",")):
        lines += ["", *memory(size, options.folder)]
        print(lines[-1], flush=True)
    shutil.rmtree(options.folder / "out", ignore_errors=True)
    write_section(options.report, "quantize", lines)


if __name__ == "__main__":
    main()
