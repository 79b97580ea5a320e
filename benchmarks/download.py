"""Speed and memory of `weightops download` against curl, aria2c and huggingface_hub: `make bench-download`.

All fetch from this machine, by turns: nginx serves one large file, as fast as it can and then so much per connection;
the tests' hub serves a repository. A run ends when its output is on disk. Figures go to docs/benchmarks.md, between
the lines that mark the section.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import WEIGHTOPS, timed

BEGIN, END = "<!-- download: begin -->", "<!-- download: end -->"
HUB = Path(__file__).parents[1] / "tests" / "hub.py"
CONFIG = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{}}
http {{
  access_log off; sendfile on; tcp_nopush on;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{port}; root {folder}/served;
    location /limited/ {{ alias {folder}/served/; limit_rate {limit}; }}
  }}
}}
"""


@dataclass
class Row:
    """A command and what it took; the first row of a table is what the others are divided by."""

    name: str
    arguments: Sequence[str]
    seconds: list[float] = field(default_factory=list)
    rss_anon_mb: float = 0.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(arguments: Sequence[str], port: int) -> Iterator[None]:
    """A server in a process of its own, once it answers."""
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def make_file(path: Path, nbytes: int) -> str:
    """Random bytes; their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, nbytes, 1 << 20):
            block = os.urandom(min(1 << 20, nbytes - start))
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def measure(rows: Sequence[Row], out: Path, runs: int) -> None:
    for _ in range(runs):
        for row in rows:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()
            seconds, memory = timed(row.arguments)
            row.seconds.append(seconds)
            row.rss_anon_mb = max(row.rss_anon_mb, memory)
    shutil.rmtree(out, ignore_errors=True)


def table(rows: Sequence[Row], nbytes: int) -> list[str]:
    baseline = rows[0]
    lines = [
        f"| command | seconds | GB/s | rate to that of {baseline.name}: median (min to max) | RssAnon peak |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [b / a for a, b in zip(row.seconds, baseline.seconds, strict=True)]
        median, spread = statistics.median(row.seconds), f"({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(
            f"| {row.name} | {median:.2f} | {nbytes / median / 1e9:.2f} | **{statistics.median(ratios):.2f}** {spread} "
            f"| {row.rss_anon_mb:.0f} MB |"
        )
    return lines


def one_file(url: str, digest: str, out: Path) -> list[Row]:
    target = str(out / "file")
    curl = f"curl --silent --fail --output {target} {url}"
    aria2 = ["aria2c", "--quiet", "--dir", str(out), "--out", "file", "-x4", "-s4", "--file-allocation=falloc"]
    return [
        Row("`curl -o`", curl.split()),
        Row("`curl -o` and `openssl sha256`", ["sh", "-c", f"{curl} && openssl sha256 {target}"]),
        Row("`aria2c -x4`", [*aria2, url]),
        Row("`aria2c -x4 --checksum`", [*aria2, f"--checksum=sha-256={digest}", url]),
        Row("**weightops download**", [WEIGHTOPS, "download", url, "--out", str(out), "--quiet"]),
        Row(
            "**weightops download --sha256**",
            [WEIGHTOPS, "download", url, "--sha256", digest, "--out", str(out), "--quiet"],
        ),
    ]


def repository(endpoint: str, out: Path) -> list[Row]:
    snapshot = (
        "import os; os.environ['HF_HUB_DISABLE_XET'] = '1'; os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1';"
        "from huggingface_hub import snapshot_download;"
        f"snapshot_download('org/name', local_dir={str(out)!r}, endpoint={endpoint!r})"
    )
    return [
        Row("huggingface_hub, which compares nothing", [sys.executable, "-c", snapshot]),
        Row(
            "**weightops download**",
            [WEIGHTOPS, "download", "org/name", "--endpoint", endpoint, "--out", str(out), "--quiet"],
        ),
    ]


def report(folder: Path, nbytes: int, runs: int, limit: int) -> list[str]:
    served, out = folder / "served", folder / "out"
    shutil.rmtree(served, ignore_errors=True)
    served.mkdir(parents=True)
    digest = make_file(served / "file", nbytes)
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, port=port, limit=limit))
    lines = []
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "nginx"
    with running([nginx, "-c", str(config)], port):
        rows = one_file(f"http://127.0.0.1:{port}/file", digest, out)
        measure(rows, out, runs)
        lines += [f"### One file of {nbytes / 1e9:g} GB from nginx", "", *table(rows, nbytes), ""]
        digest = make_file(served / "file", nbytes // 4)
        rows = one_file(f"http://127.0.0.1:{port}/limited/file", digest, out)
        rows = [row for row in rows if row.name in ("`curl -o`", "`aria2c -x4`", "**weightops download --sha256**")]
        measure(rows, out, runs // 2 + 1)
        title = f"### One file of {nbytes / 4e9:g} GB from nginx, {limit / 1e6:.0f} MB/s per connection"
        lines += [title, "", *table(rows, nbytes // 4), ""]
    (served / "file").unlink()
    for index in range(4):
        make_file(served / f"model-{index}.safetensors", nbytes // 4)
    (served / "config.json").write_text("{}")
    port_file = folder / "port"
    port_file.unlink(missing_ok=True)
    hub = [sys.executable, str(HUB), "--root", str(served), "--repo", "org/name", "--port-file", str(port_file)]
    process = subprocess.Popen(hub)
    try:
        while not port_file.exists() or not port_file.read_text().strip():
            time.sleep(0.2)
        rows = repository(f"http://127.0.0.1:{port_file.read_text().split()[0]}", out)
        measure(rows, out, runs)
    finally:
        process.terminate()
        process.wait()
    lines += [f"### A repository of 4 files of {nbytes / 4e9:g} GB from a hub", "", *table(rows, nbytes), ""]
    shutil.rmtree(served)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbytes", type=int, default=4_000_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", type=int, default=40_000_000, help="bytes per second and connection")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-download"))
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        BEGIN,
        "## download",
        "",
        f"Written by `make bench-download`: {options.runs} runs of each command by turns, server and client on the same"
        f" {os.cpu_count()} cores; a run",
        "ends when the file is on disk (`sync`).",
        "",
        *report(options.folder.resolve(), options.nbytes, options.runs, options.limit),
        END,
    ]
    section = "\n".join(lines)
    print(section, flush=True)
    text = options.report.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    if not after:
        before, notes, after = text.partition("## Reading them")
        after = f"\n\n{notes}{after}"
    options.report.write_text(before + section + after)


if __name__ == "__main__":
    main()
