"""Compressed deltas: how small they are, how fast they are made and recovered from: `make bench-deltas`.

Sizes are of random weights of a LLaMA's shape that were changed in ways that people change them. Rates are those of the
code of blocks alone, in one thread; recovering is measured as a whole command, by turns with the plain delta: on a file
system in memory, and with the delta behind a link that all connections share. Figures go to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from bench import SHARD, ratio, weightops, write_section
from family import SHAPES, Shape
from release import make_adapter
from safetensors.torch import load_file, save_file
from side import Side

from weightops.ops.byte_planes import BLOCK_NBYTES, decode, encode

SIGMA = 0.02
LINK_NBYTES_PER_S = 125_000_000
Change = Callable[[torch.Tensor], torch.Tensor]


def save(folder: Path, shape: Shape, tensors: dict[str, torch.Tensor]) -> None:
    """A checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config()))


def random_weights(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = dict(shape.tensors())
    return {name: (torch.randn(size, generator=generator) * SIGMA).to(dtype) for name, size in sizes.items()}


def moved(share: float, tensor: torch.Tensor) -> torch.Tensor:
    """Each weight a little way off: by a normal step of this share of what weights spread."""
    return (tensor.float() + torch.randn(tensor.shape) * SIGMA * share).to(tensor.dtype)


def passed_through(dtypes: Sequence[torch.dtype], tensor: torch.Tensor) -> torch.Tensor:
    for dtype in dtypes:
        tensor = tensor.to(dtype)
    return tensor


def delta_nbytes(raw: Path, tuned: Path, out: Path, *options: str) -> int:
    shutil.rmtree(out, ignore_errors=True)
    weightops("diff", "--raw", str(raw), "--tuned", str(tuned), "--out", str(out), *options)
    return sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".wdelta"))


def size_rows(folder: Path) -> Iterator[str]:
    """What a delta takes, plain and compressed, by the kind of change."""
    shape = SHAPES["small"]
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raw, tuned = folder / f"raw-{name}", folder / "tuned"
        weights = random_weights(shape, dtype)
        save(raw, shape, weights)
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        changes: dict[str, Change] = {
            f"fine-tune, each weight moved by {share:.1%} of their spread": partial(moved, share)
            for share in (0.001, 0.01, 0.1)
        }
        changes[f"cast to {other} and back".replace("torch.", "")] = partial(passed_through, (other, dtype))
        changes[f"cast to {other}".replace("torch.", "")] = partial(passed_through, (other,))
        for change, apply in changes.items():
            save(tuned, shape, {key: apply(tensor) for key, tensor in weights.items()})
            yield size_row(name, change, raw, tuned, folder)
        for which, linear in (("q and v", ("q_proj", "v_proj")), ("all linear layers", None)):
            adapter = make_adapter(shape, folder / f"adapter-{len(linear or ())}")
            if linear:
                keep_modules(adapter, linear)
            shutil.rmtree(tuned, ignore_errors=True)
            weightops("merge-lora", "--base", str(raw), "--adapter", str(adapter), "--out", str(tuned))
            yield size_row(name, f"LoRA of rank 16 on {which}, merged", raw, tuned, folder)


def keep_modules(adapter: Path, modules: Sequence[str]) -> None:
    """Leave these modules alone in an adapter."""
    path = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n.split(".")[-3] in modules}, path, {"format": "pt"})
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": list(modules)}))


def size_row(dtype: str, change: str, raw: Path, tuned: Path, folder: Path) -> str:
    plain = delta_nbytes(raw, tuned, folder / "delta")
    small = delta_nbytes(raw, tuned, folder / "delta", "--compress")
    return f"| {dtype} | {change} | {plain / 1e6:.0f} MB | {small / 1e6:.1f} MB | **{small / plain:.2f}** |"


def code_rates(dtype: torch.dtype, runs: int) -> list[str]:
    """GB of output in a second of one core: blocks made, and blocks read and combined with the base's bits."""
    raw = (torch.randn(32 * BLOCK_NBYTES // dtype.itemsize) * SIGMA).to(dtype)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    base = raw.view(torch.uint8).numpy()
    mixed = (moved(0.01, raw).view(bits) ^ raw.view(bits)).view(torch.uint8).numpy()
    blocks = [mixed[i : i + BLOCK_NBYTES].data for i in range(0, len(mixed), BLOCK_NBYTES)]
    bases = [base[i : i + BLOCK_NBYTES].view(np.uint64) for i in range(0, len(base), BLOCK_NBYTES)]
    out = bytearray(BLOCK_NBYTES)
    words, view = np.frombuffer(out, np.uint64), memoryview(out)
    coded: list[memoryview] = []
    made, read = [], []
    for _ in range(runs):
        start = time.process_time()
        coded = [memoryview(encode(block, dtype.itemsize)) for block in blocks]
        made.append(len(mixed) / (time.process_time() - start) / 1e9)
        start = time.process_time()
        for block, own in zip(coded, bases, strict=True):
            decode(block, view, dtype.itemsize)
            np.bitwise_xor(words, own, out=words)
        read.append(len(mixed) / (time.process_time() - start) / 1e9)
    return [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in (made, read)]


class Link:
    """Serves a folder over HTTP, all connections together at so many bytes per second."""

    def __init__(self, root: Path, nbytes_per_s: int) -> None:
        self.root, self._rate, self._lock, self._free_at = root, nbytes_per_s, threading.Lock(), 0.0

    def __enter__(self) -> str:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"link": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, nbytes: int) -> None:
        """Until so many bytes more have had their turn."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + nbytes / self._rate
            left = self._free_at - time.monotonic()
        time.sleep(max(0.0, left))


class _Handler(BaseHTTPRequestHandler):
    link: Link
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.link.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(size, int(asked[2] or size) + 1)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file, contextlib.suppress(ConnectionError):
            file.seek(start)
            while start < stop:
                piece = file.read(min(1 << 17, stop - start))
                self.link.wait_for(len(piece))
                self.wfile.write(piece)
                start += len(piece)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def recover(side: Side, raw: Path, diff: str, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    words = ["recover", "--raw", str(raw), "--diff", diff, "--out", str(out), "--max-shard-size", SHARD, "--quiet"]
    side.run([sys.executable, "-P", "-m", "weightops", *words])
    shutil.rmtree(out)


def recover_rows(folder: Path, runs: int) -> Iterator[str]:
    """Seconds of `recover` from both deltas, by turns; at 1 % change in bfloat16."""
    shape = SHAPES["1b"]
    raw, tuned = folder / "raw", folder / "tuned"
    weights = random_weights(shape, torch.bfloat16)
    save(raw, shape, weights)
    save(tuned, shape, {name: moved(0.01, tensor) for name, tensor in weights.items()})
    del weights
    pair = ("diff", "--raw", str(raw), "--tuned", str(tuned))
    weightops(*pair, "--out", str(folder / "plain"))
    weightops(*pair, "--out", str(folder / "small"), "--compress")
    shutil.rmtree(tuned)
    for title, rate in (("both on tmpfs", None), ("the delta behind 1 Gb/s", LINK_NBYTES_PER_S)):
        plain, small = Side(), Side()
        with Link(folder, rate) if rate else contextlib.nullcontext(str(folder)) as place:
            for _ in range(runs):
                recover(plain, raw, f"{place}/plain/", folder / "out")
                recover(small, raw, f"{place}/small/", folder / "out")
        cells = [title, *(f"{statistics.median(side.wall_s):.2f}" for side in (plain, small))]
        cells += [ratio(small.wall_s, plain.wall_s), "< 1" if rate else "≤ 1.5"]
        cells += [ratio(small.processor_s, plain.processor_s), f"{max(small.rss_anon_mb):.0f} MB"]
        yield f"| {' | '.join(cells)} |"


def shown(rows: Iterator[str]) -> Iterator[str]:
    for row in rows:
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/weightops-deltas"), help="on tmpfs, 9 GB")
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    torch.manual_seed(1)
    torch.set_num_threads(1)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    try:
        rates = [
            f"| {str(dtype).removeprefix('torch.')} | {' | '.join(code_rates(dtype, options.runs))} |"
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ]
        print("\n".join(rates), flush=True)
        recovered = list(shown(recover_rows(options.folder, options.runs)))
        sizes = list(shown(size_rows(options.folder / "sizes")))
    finally:
        shutil.rmtree(options.folder)
    lines = [
        "## Compressed deltas",
        "",
        f"Written by `make bench-deltas`: random weights of a LLaMA's shape, {options.runs} runs by turns on "
        f"{os.cpu_count()} cores,",
        f"with a load of {load:.0f} from other work before the first. Sizes are those of all files with weights.",
        "",
        "| dtype | tuned is | `diff` | `diff --compress` | share |",
        "|---|---|---|---|---|",
        *sizes,
        "",
        "A cast that stays changes the dtype: nothing of the original takes part, and the delta carries the tensors",
        "themselves.",
        "",
        "### Rates of one core",
        "",
        "GB of a model in a second of processor time, each weight moved by 1 % of their spread, from memory to memory:",
        "median (min to max). Goal in bfloat16: 0.5 for recovering.",
        "",
        "| dtype | planes and zstd | zstd, planes and exclusive or |",
        "|---|---|---|",
        *rates,
        "",
        "### Recovering",
        "",
        "1.1B parameters in bfloat16, each weight moved by 1 % of their spread; the link is a server on the same",
        "machine that gives 125 MB/s to all connections together.",
        "",
        "| | plain, seconds | compressed, seconds | ratio of wall: median (min to max) | goal | of processor seconds "
        "| RssAnon peak |",
        "|---|---|---|---|---|---|---|",
        *recovered,
    ]
    write_section(options.report, "deltas", lines)


if __name__ == "__main__":
    main()
