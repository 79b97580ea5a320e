"""Memory over time: a script that loads both models, as those of 2023 do, against weightops; to docs/memory.svg.

    python benchmarks/memory.py --size 3b

The same family, the same job (raw + fp16 diff), the same measure: RssAnon every 50 ms.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench import WEIGHTOPS, jobs

LOAD_EVERYTHING = """
import sys, glob
from pathlib import Path
from safetensors.torch import load_file, save_file

def load(folder):
    return {n: t.clone() for path in sorted(glob.glob(f"{folder}/*.safetensors")) for n, t in load_file(path).items()}

raw, diff = load(sys.argv[1]), load(sys.argv[2])
for name, tensor in diff.items():
    tensor.add_(raw[name])
out = Path(sys.argv[3])
out.mkdir()
save_file(diff, out / "model.safetensors", metadata={"format": "pt"})
"""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 300, 60, 40, 36
Line = list[tuple[float, float]]


def sample(arguments: list[str]) -> Line:
    """(seconds, MB of anonymous memory) while a process runs."""
    points: Line = [(0.0, 0.0)]
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            used = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:"))
            points.append((time.perf_counter() - start, used / 1000))
        except (OSError, StopIteration):
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{arguments} failed")
    return [*points, (time.perf_counter() - start, 0.0)]


def svg(lines: dict[str, Line], title: str) -> str:
    """A line chart, readable on light and dark ground, without a script."""
    seconds = max(x for line in lines.values() for x, _ in line)
    top_mb = max(y for line in lines.values() for _, y in line) * 1.08

    def point(x: float, y: float) -> str:
        px = LEFT + x / seconds * (WIDTH - LEFT - 20)
        py = HEIGHT - BOTTOM - y / top_mb * (HEIGHT - BOTTOM - TOP)
        return f"{px:.1f},{py:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="15" fill="#222">{title}</text>',
    ]
    step = next(size for size in (m * 10**k for k in range(7) for m in (1, 2, 5)) if top_mb / size < 6)
    for mb in range(0, int(top_mb), step):
        x, y = point(0, mb).split(",")
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end" fill="#666">{mb / 1000:g} GB</text>'
        )
    for second in range(0, int(seconds) + 1, max(1, int(seconds / 8))):
        x, y = point(second, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 20:.1f}" text-anchor="middle" fill="#666">{second} s</text>')
    for (name, line), colour in zip(lines.items(), ("#c0392b", "#1f6fb2"), strict=True):
        path = " ".join(point(x, y) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        x, peak = max(line, key=lambda p: p[1])
        px, py = map(float, point(x, peak).split(","))
        anchor = "end" if px > WIDTH / 2 else "start"
        label = f"{name}: {peak:,.0f} MB, {line[-1][0]:.1f} s"
        parts.append(f'<text x="{px:.0f}" y="{py - 8:.0f}" text-anchor="{anchor}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3b")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--report", type=Path, default=Path("docs/memory.svg"))
    options = parser.parse_args()
    folder = options.folder / options.size
    job = jobs(options.size, folder)[0]
    raw, diff = (str(path) for path in job.reads)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    lines = {"load both models": sample([sys.executable, "-c", LOAD_EVERYTHING, raw, diff, str(out)])}
    shutil.rmtree(out)
    lines["weightops"] = sample([WEIGHTOPS, *job.arguments])
    shutil.rmtree(out)
    title = f"Anonymous memory while recovering a {options.size.upper()} model from raw + fp16 diff"
    options.report.write_text(svg(lines, title))


if __name__ == "__main__":
    main()
