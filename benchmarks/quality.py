"""What quantising costs the trained small model in perplexity: `make bench-quality`, to docs/quantize.md."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench import write_section

import weightops

DATA = Path(__file__).parents[1] / "tests/data/tiny-llama"
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("to nearest", {"method": "rtn"}),
    ("to nearest, no search for clipping", {"method": "rtn", "mse": False}),
    ("GPTQ", {}),
    ("GPTQ, act-order", {"act_order": True}),
    ("GPTQ, static groups", {"static_groups": True}),
    ("GPTQ, asymmetric", {"sym": False}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("docs/quantize.md"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    measured = {"seq_len": options.seq_len, "device": "cpu"}
    (full,) = weightops.evaluate(DATA, DATA / "heldout.txt", **measured).scores
    lines = [
        "## What it costs",
        "",
        f"The small LLaMA in `tests/data/tiny-llama`, {full.tokens:,} tokens of held-out text in windows of "
        f"{options.seq_len}, calibrated with {options.samples} windows of its training text; groups of 128, "
        "v1 format. In float16 its perplexity is "
        f"**{full.perplexity:.3f}**. Written by `make bench-quality`.",
        "",
        "| | 4 bits | KL | top-1 | 3 bits | KL | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, settings in ROWS:
        cells = []
        for bits in (4, 3):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                data = {"calibration": [DATA / "calibration.txt"]} if settings.get("method") != "rtn" else {}
                given = {"samples": options.samples, "seq_len": options.seq_len, "device": "cpu", **data, **settings}
                weightops.quantize(DATA, out, bits=bits, **given)
                scores = weightops.evaluate(out, DATA / "heldout.txt", reference=DATA, **measured).scores
            ((score, near),) = [(s, s.agreement) for s in scores if s.agreement is not None]
            cells += [f"**{score.perplexity:.3f}**", f"{near.kl_mean:.4f}", f"{100 * near.top1:.1f} %"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_section(options.report, "quality", lines)


if __name__ == "__main__":
    main()
