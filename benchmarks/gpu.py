"""Everything that only a GPU can tell, in one go of eight minutes: `make gpu PYTHON=python3.12`.

Nothing is installed: the torch and Triton of that Python are used, and kernels, tests and weightops from this checkout.
Parts run in the order of their importance, each in a process of its own with a limit, and write what they find at once;
so a part that hangs, crashes or lacks a library costs the others nothing. What a part lacks is said, and it is skipped.

    build/gpu/gpu.md      a report to read
    build/gpu/gpu.json    the same for programs
    build/gpu/table.json  tuned configs, for `weightops_kernels.configs.load`

`--rehearse` runs the same parts on the CPU as far as they go there: kernels in Triton's interpreter, tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "7B": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "13B": ((5120, 13824),),
    "70B": ((8192, 8192), (8192, 28672)),
    "BLOOM-7B": ((4096, 16384),),
}
"""K and N of linear layers by model."""
ROWS = (1, 4, 16, 64, 256, 1024)
MODEL = ROOT / "tests/data/tiny-llama"
KERNELS = ("torch", "triton")
WEIGHTOPS = ("torch", "transformers", "safetensors", "msgspec", "numpy", "xxhash", "urllib3", "yaml")

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the whole: what it needs, how long it may take, and what makes its rows."""

    title: str
    needs: tuple[str, ...]
    limit_s: int
    rows: Callable[[str, Path], Iterator[Row]]


def sizes(device: str) -> list[tuple[str, int, int]]:
    """Models and their layers, in the order in which they matter."""
    if device != "cuda":
        return [("tiny", 256, 128)]
    return [(model, k, n) for model, layers in SHAPES.items() for k, n in layers]


def kernels(device: str, out: Path) -> Iterator[Row]:
    """Each check of the kernels, and whether it held."""
    import gpu_checks

    for name, check in gpu_checks.all_checks(device):
        began = time.monotonic()
        try:
            check()
            found = "ok"
        except Exception as error:  # whatever it is, the other checks are still worth their time
            found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield {"check": name, "result": found, "elapsed_s": round(time.monotonic() - began, 1)}


def models(device: str, out: Path) -> Iterator[Row]:
    """Perplexity and text of a small trained model, quantised, on the device against the CPU."""
    import weightops

    quantised, plain = out / "quantised", out / "plain"
    if not quantised.exists():
        weightops.quantize(
            MODEL, quantised, calibration=MODEL / "calibration.txt", samples=8, seq_len=128, device="cpu"
        )
        weightops.dequantize(quantised, plain, dtype="float32")
    for engine in ("dequantized", "packed"):
        for dtype in ("float32", "float16", "bfloat16"):
            found = weightops.evaluate(
                quantised,
                MODEL / "heldout.txt",
                reference=plain,
                seq_len=128,
                dtype=dtype,
                device=device,
                engine=engine,
            )
            score = found.scores[-1]
            assert score.agreement is not None
            yield {
                "model": f"{engine}, {dtype}",
                "perplexity": round(score.perplexity, 4),
                "KL from float32 on the CPU": f"{score.agreement.kl_mean:.2e}",
                "same next token": f"{100 * score.agreement.top1:.2f} %",
                "layers": score.engine,
            }
    texts = [
        "".join(weightops.generate(quantised, "In the beginning", max_new_tokens=20, device=where))
        for where in ("cpu", device)
    ]
    yield {"model": "20 tokens in float32", "same next token": "all" if texts[0] == texts[1] else repr(texts)}


def quantise(device: str, out: Path) -> Iterator[Row]:
    """The integers that GPTQ finds on the device, against those of the CPU."""
    import numpy as np

    import weightops
    from weightops.ops.numbers.bitpack import unpack

    options: dict[str, Any] = {
        "calibration": MODEL / "calibration.txt",
        "samples": 8,
        "seq_len": 128,
        "act_order": True,
    }
    for where in ("cpu", device):
        weightops.quantize(MODEL, out / f"on-{where}", device=where, overwrite=True, act_order=True, **options)
    one, other = (weightops.open_checkpoint(out / f"on-{where}") for where in ("cpu", device))
    for name in (n for n in one if n.endswith(".qweight") and ".layers.0." in n):
        rows = one[name.replace("qweight", "g_idx")].spec.shape[0]
        first, second = (unpack(c[name].numpy(), 4, rows).astype(np.int16) for c in (one, other))
        yield {
            "layer": name.removesuffix(".qweight"),
            "integers that differ": f"{100 * float((first != second).mean()):.3f} %",
            "by at most": int(np.abs(first - second).max()),
        }


def table(device: str, out: Path) -> Iterator[Row]:
    """Microseconds of a layer of each shape and number of rows beside what else multiplies with four bits."""
    import torch
    from weightops_kernels import configs, launch, layout, timing, tune

    if (out / "table.json").exists():
        configs.load(out / "table.json")
    bandwidth = timing.copy_bandwidth()
    yield {"layer": f"copy: {bandwidth / 1e12:.2f} TB/s"}
    for model, k, n in sizes(device):
        layer = tune.random_layer(k, n, 128)
        weight = layout.repack(layer)
        for m in ROWS:
            x = torch.randn(m, k, dtype=torch.float16, device=device)
            # mypy infers no lambda with defaults
            ours = timing.time_us(lambda x=x, w=weight: launch.matmul(x, w))  # type: ignore[misc]
            moved = (weight.nbytes + 2 * m * (k + n)) / (ours * 1e-6) / bandwidth
            row: Row = {"layer": f"{model}: {k} x {n}", "M": m, "ours": round(ours, 1), "of copy": f"{moved:.0%}"}
            for name, function in tune.rivals(x, layer, 128).items():
                if tune.wrong(x, function(), layer):
                    row[name] = "another result"
                else:
                    other = timing.time_us(function)
                    row[name] = f"{other:.1f} ({other / ours:.2f} x ours)"
            yield row


def tuner(device: str, out: Path) -> Iterator[Row]:
    """The best of a few tile sizes for each shape and number of rows, into a table."""
    import torch
    from weightops_kernels import configs, layout, tune
    from weightops_kernels.configs import Key

    found = configs.read_table(out / "table.json") if (out / "table.json").exists() else {}
    name = torch.cuda.get_device_name()
    for model, k, n in sizes(device):
        weight = layout.repack(tune.random_layer(k, n, 128))
        for m in ROWS:
            x = torch.randn(m, k, dtype=torch.float16, device=device)
            config, elapsed_us = tune.best(x, weight, few=True)
            found[str(Key(name, configs.bucket(m), n, k, weight.group_size))] = config
            configs.write_table(out / "table.json", found)
            yield {"layer": f"{model}: {k} x {n}", "M": m, "microseconds": round(elapsed_us, 1), "config": str(config)}


PARTS = {
    "kernels": Part("Kernels against float64", KERNELS, 110, kernels),
    "models": Part("A quantised model on the device", WEIGHTOPS, 80, models),
    "quantise": Part("GPTQ on the device against the CPU", WEIGHTOPS, 70, quantise),
    "tuner": Part("Tile sizes", KERNELS, 115, tuner),
    "table": Part("Microseconds", KERNELS, 95, table),
}
NEEDS_CUDA = ("tuner", "table")


def run_part(name: str, device: str, out: Path) -> None:
    """In a process of its own: each row goes to disk as it is found."""
    with (out / f"{name}.jsonl").open("w") as file:
        try:
            for row in PARTS[name].rows(device, out):
                file.write(json.dumps(row) + "\n")
                file.flush()
        except Exception:  # the rows so far are kept, and what ended them is one of them
            file.write(json.dumps({"failed": traceback.format_exc().splitlines()[-1]}) + "\n")
            raise


def outcome(name: str, device: str, out: Path) -> Row:
    """Run a part within its limit; what became of it, and its rows."""
    part, began = PARTS[name], time.monotonic()
    limit_s = part.limit_s * (1 if device == "cuda" else 10)  # nobody waits for a CPU by the second
    missing = [library for library in part.needs if importlib.util.find_spec(library) is None]
    if missing:
        return {"part": name, "status": f"skipped: this Python lacks {', '.join(missing)}", "rows": []}
    if name in NEEDS_CUDA and device != "cuda":
        return {"part": name, "status": "skipped: times of a CPU say nothing", "rows": []}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests/kernels")))
    command = [sys.executable, __file__, "--part", name, "--device", device, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))}
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, env=environment, stdout=log, stderr=log, timeout=limit_s, check=False
            ).returncode
            status = "done" if code == 0 else f"ended with exit code {code}; {name}.log says more"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s} s, with what it had found"
    found = out / f"{name}.jsonl"
    rows = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    return {"part": name, "status": status, "elapsed_s": round(time.monotonic() - began, 1), "rows": rows}


def machine() -> Row:
    """Python, libraries and device, without which figures mean nothing."""
    found: Row = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            module = __import__(name)
            found[name] = str(module.__version__)
        except ImportError as error:
            found[name] = f"missing ({error})"
    try:
        import torch

        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    except ImportError:
        found["device"] = "no torch"
    return found


def report(facts: Row, parts: list[Row]) -> str:
    """The page, as Markdown."""
    lines = ["# What the GPU said", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for part in parts:
        lines += [f"## {PARTS[part['part']].title}", "", f"{part['status']}", ""]
        heads = list(dict.fromkeys(key for row in part["rows"] for key in row))
        if heads:
            lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
            lines += [f"| {' | '.join(str(row.get(head, '')) for head in heads)} |" for row in part["rows"]]
            lines.append("")
    return "\n".join(lines)


def main() -> int:
    """The command; 1 if something was wrong, 3 if there was no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, as far as that goes")
    parser.add_argument("--only", action="append", choices=PARTS, help="these parts alone")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.part:
        run_part(given.part, given.device, out)
        return 0
    facts, device = machine(), "cpu" if given.rehearse else "cuda"
    if device == "cuda" and facts["device"].startswith("no "):
        print(f"{facts['device']} in {sys.executable}; --rehearse runs on the CPU what can run there")
        return 3
    parts: list[Row] = []
    for name in given.only or PARTS:
        print(f"{PARTS[name].title} (at most {PARTS[name].limit_s} s) ...", flush=True)
        parts.append(outcome(name, device, out))
        print(f"  {parts[-1]['status']}, {len(parts[-1]['rows'])} rows", flush=True)
        (out / "gpu.json").write_text(json.dumps({**facts, "parts": parts}, indent=2))
        (out / "gpu.md").write_text(report(facts, parts))
    print(f"{out / 'gpu.md'}")
    wrong = [row for part in parts for row in part["rows"] if "failed" in row or row.get("result", "ok") != "ok"]
    return int(bool(wrong) or any("exit code" in part["status"] for part in parts))


if __name__ == "__main__":
    sys.exit(main())
