"""Speed and memory of sign and of verify --signature: `make bench-sign`.

By turns with `openssl dgst -sha256` on as many files at a time as there are cores, which is the digest's own rate, and
with model-signing's command line. Each file of a model without contents has several names, so that much is read of what
little memory holds, and no disk is measured. Where others share the cores, the processor's seconds say more than those
of the clock. Figures go to docs/benchmarks.md between the marking lines.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from bench import WEIGHTOPS, files, ratio, write_section
from family import SHAPES, make
from side import Side

DIGEST = "`openssl dgst -sha256`, one file a core"
THEIRS = [str(Path(sys.executable).with_name("model_signing"))]


def make_model(size: str, folder: Path, names: int) -> Path:
    """A folder with `names` names for each file of a model without contents."""
    model = folder / "model"
    if not model.exists():
        make(SHAPES[size], folder, sparse=True)
        model.mkdir()
        for number, path in ((number, path) for number in range(names) for path in files([folder / "raw"])):
            (model / f"{number}-{path.name}").hardlink_to(path)
    return model


def contestants(folder: Path, cores: int) -> dict[str, list[str]]:
    """What is run, by what it is called; the key is made where it is not there."""
    model, key, public = folder / "model", folder / "signer.key", folder / "signer.pub"
    if not public.exists():
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)], check=True)
        subprocess.run(["openssl", "ec", "-in", str(key), "-pubout", "-out", str(public)], check=True)
    signature = str(model / "model.sig")
    paths = " ".join(map(str, files([model])))
    return {
        DIGEST: ["sh", "-c", f"echo {paths} | xargs -n1 -P{cores} openssl dgst -sha256"],
        "**weightops sign**": [WEIGHTOPS, "sign", str(model), "--key", str(key), "--overwrite", "--quiet"],
        "**weightops verify --signature**": [
            WEIGHTOPS, "verify", str(model), "--signature", signature, "--key", str(public), "--quiet",
        ],
        "`model_signing sign key`": [
            *THEIRS, "sign", "key", str(model), "--signature", signature, "--private_key", str(key),
        ],
        "`model_signing verify key`": [
            *THEIRS, "verify", "key", str(model), "--signature", signature, "--public_key", str(public),
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=SHAPES)
    parser.add_argument("--names", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-sparse"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    folder = options.folder / options.size
    paths = files([make_model(options.size, folder, options.names)])
    nbytes = sum(path.stat().st_size for path in paths)
    cores = len(os.sched_getaffinity(0))
    commands = contestants(folder, cores)
    sides = {name: Side() for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            sides[name].run(command)
            print(f"{name}: {sides[name].wall_s[-1]:.2f} s, {sides[name].processor_s[-1]:.2f} s", flush=True)
    lines = [
        "## Signatures",
        "",
        f"Written by `make bench-sign`: {options.runs} runs of each whole command by turns, on {nbytes / 1e9:.0f} GB",
        f"in {len(paths)} files of a warm cache, and {cores} cores. Beside the seconds stand those of the processor,",
        "in brackets. Goal: 0.9 of the digest's own rate.",
        "",
        "| command | seconds | rate | of the digest's own: median (min to max) | by processor | RssAnon peak |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in sides.items():
        seconds, used = statistics.median(side.wall_s), statistics.median(side.processor_s)
        memory = "" if name == DIGEST else f"{max(side.rss_anon_mb):.0f} MB"
        lines.append(
            f"| {name} | {seconds:.2f} ({used:.2f}) | {nbytes / seconds / 1e9:.2f} GB/s "
            f"| {ratio(sides[DIGEST].wall_s, side.wall_s)} | {ratio(sides[DIGEST].processor_s, side.processor_s)} "
            f"| {memory} |"
        )
    write_section(options.report, "sign", lines)


if __name__ == "__main__":
    main()
