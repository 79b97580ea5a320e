"""Processor seconds and memory of reading and writing a bucket, beside boto3 and obstore: `make bench-buckets`.

The server is rclone's, on this machine; what is measured is the client alone, in a process of its own, from its first
request to its last, its imports left out. boto3 and obstore are in an environment of their own. Figures go to
docs/benchmarks.md, between the lines that mark the section.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightops.stores.s3.connection import S3

BEGIN, END = "<!-- buckets: begin -->", "<!-- buckets: end -->"
KEY, SECRET, BUCKET, NAME = "key", "secret", "bench", "file"
BLOCK, RANGE, PART = 4 << 20, 8 << 20, 16 << 20


class Took:
    """Counts what has come, and looks at a byte of each piece."""

    def __init__(self) -> None:
        self.nbytes = self.sum = 0

    def __call__(self, piece: memoryview) -> None:
        self.nbytes += len(piece)
        self.sum += piece[-1]


def ours_read(endpoint: str, nbytes: int, took: Took) -> Callable[[], None]:
    from weightops.stores.reader import FileReader
    from weightops.stores.s3.store import S3Store
    from weightops.stores.stores import BUCKETS, Stores

    def run() -> None:
        with (stores := Stores(connect={BUCKETS: lambda: _connect(endpoint)})).connected(), FileReader(stores) as files:
            file = S3Store(BUCKET, "", stores.s3).identity(NAME)
            for part in files.blocks(file, BLOCK):
                took(part)

    return run


def ours_write(endpoint: str, nbytes: int, took: Took) -> Callable[[], None]:
    from weightops.stores.s3.store import S3Store

    def run() -> None:
        with _connect(endpoint) as connection:
            target = S3Store(BUCKET, "", connection).target("written", nbytes)
            for start, block in _blocks(nbytes):
                target.write(start, block, len(block))
            target.close()
            target.commit()

    return run


def _connect(endpoint: str) -> S3:
    from botocore.credentials import Credentials

    from weightops.stores.s3.account import Account, Endpoint
    from weightops.stores.s3.connection import S3

    return S3(Account(Credentials(KEY, SECRET), endpoint=Endpoint(endpoint, is_virtual=False)))


def _blocks(nbytes: int) -> Iterator[tuple[int, memoryview]]:
    block = memoryview(os.urandom(BLOCK))
    for start in range(0, nbytes, BLOCK):
        yield start, block[: nbytes - start]


def _boto3(endpoint: str) -> Any:
    import boto3

    return boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )


def boto3_read(endpoint: str, nbytes: int, took: Took) -> Callable[[], None]:
    client = _boto3(endpoint)

    def run() -> None:
        for start in range(0, nbytes, RANGE):
            wanted = f"bytes={start}-{min(nbytes, start + RANGE) - 1}"
            answer = client.get_object(Bucket=BUCKET, Key=NAME, Range=wanted)
            took(memoryview(answer["Body"].read()))

    return run


def boto3_write(endpoint: str, nbytes: int, took: Took) -> Callable[[], None]:
    client = _boto3(endpoint)

    def run() -> None:
        upload = client.create_multipart_upload(Bucket=BUCKET, Key="written")["UploadId"]
        parts, buffer = [], bytearray()
        at = {"Bucket": BUCKET, "Key": "written", "UploadId": upload}
        for start, block in _blocks(nbytes):
            buffer += block
            if len(buffer) >= PART or start + len(block) == nbytes:
                number = len(parts) + 1
                answer = client.upload_part(**at, PartNumber=number, Body=bytes(buffer))
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
                buffer.clear()
        client.complete_multipart_upload(**at, MultipartUpload={"Parts": parts})

    return run


def _obstore(endpoint: str) -> object:
    from obstore.store import S3Store

    return S3Store(
        BUCKET,
        endpoint=endpoint,
        access_key_id=KEY,
        secret_access_key=SECRET,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def obstore_read(endpoint: str, nbytes: int, took: Took) -> Callable[[], None]:
    import obstore

    store = _obstore(endpoint)

    def run() -> None:
        # rclone answers a request for a range with 200, which obstore refuses.
        for chunk in obstore.get(store, NAME).stream(min_chunk_size=RANGE):
            took(memoryview(chunk))

    return run


def obstore_write(endpoint: str, nbytes: int, took: Took) -> Callable[[], None]:
    import obstore

    store = _obstore(endpoint)

    def run() -> None:
        with obstore.open_writer(store, "written", buffer_size=PART, max_concurrency=2) as writer:
            for _, block in _blocks(nbytes):
                writer.write(bytes(block))

    return run


CLIENTS = {
    "**weightops**": (ours_read, ours_write),
    "boto3 1.44.8": (boto3_read, boto3_write),
    "obstore 0.12.1": (obstore_read, obstore_write),
}


def child(name: str, writes: bool, endpoint: str, nbytes: int) -> None:
    """Do one thing, and say what it took."""
    took = Took()
    run = CLIENTS[name][writes](endpoint, nbytes, took)
    used, start = time.process_time(), time.perf_counter()
    run()
    wall_s, processor_s = time.perf_counter() - start, time.process_time() - used
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(li for li in status.splitlines() if li.startswith("VmHWM:"))
    print(json.dumps([took.nbytes, wall_s, processor_s, int(peak.split()[1]) / 1000]))


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """rclone, over a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") or "rclone"
    words = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", str(folder)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def report(folder: Path, others: str, nbytes: int, runs: int) -> list[str]:
    """The tables."""
    found: dict[tuple[str, bool], list[list[float]]] = {}
    with server(folder) as endpoint:
        block = os.urandom(BLOCK)
        with (folder / BUCKET / NAME).open("wb") as file:
            for start in range(0, nbytes, BLOCK):
                file.write(block[: nbytes - start])
        for _ in range(runs):
            for name in CLIENTS:
                python = sys.executable if name == "**weightops**" else others
                for writes in (False, True):
                    words = [python, __file__, "--child", name, "--endpoint", endpoint, "--nbytes", str(nbytes)]
                    done = subprocess.run(
                        [*words, *(["--writes"] if writes else [])], stdout=subprocess.PIPE, text=True, check=True
                    )
                    came, *figures = json.loads(done.stdout)
                    assert writes or came == nbytes, name
                    found.setdefault((name, writes), []).append(figures)
    lines = []
    for writes in (False, True):
        what = "Writing, by parts of 16 MiB" if writes else "Reading"
        lines += [f"### {what}", "", "| client | processor seconds per GB | GB/s | most memory |", "|---|---|---|---|"]
        for name in CLIENTS:
            wall_s, processor_s, peak = zip(*found[name, writes], strict=True)
            low, high = min(processor_s) / nbytes * 1e9, max(processor_s) / nbytes * 1e9
            rate, middle = nbytes / statistics.median(wall_s) / 1e9, statistics.median(processor_s) / nbytes * 1e9
            lines.append(f"| {name} | **{middle:.2f}** ({low:.2f} to {high:.2f}) | {rate:.2f} | {max(peak):.0f} MB |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbytes", type=int, default=1_000_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-buckets"))
    parser.add_argument("--others", default=".venv-buckets/bin/python", help="a Python with boto3 and obstore")
    parser.add_argument("--report", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--child")
    parser.add_argument("--writes", action="store_true")
    parser.add_argument("--endpoint", default="")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.writes, options.endpoint, options.nbytes)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    text = [
        BEGIN,
        "## Buckets",
        "",
        f"Written by `make bench-buckets`: {options.runs} runs by turns over {options.nbytes / 1e9:g} GB; the server "
        "is rclone's,",
        "on the same cores, and is not counted. Every client signs each request and what it sends, by SHA-256. Reading",
        "is of ranges of 8 MiB, of which weightops has four on their way, and of one stream with obstore; writing is",
        "of parts of 16 MiB, of which weightops and obstore have two on their way.",
        "",
        *report(options.folder, options.others, options.nbytes, options.runs),
        END,
    ]
    shutil.rmtree(options.folder)
    before, _, rest = options.report.read_text().partition(BEGIN)
    after = rest.partition(END)[2] if rest else "\n"
    options.report.write_text(before.rstrip() + "\n\n" + "\n".join(text) + after)


if __name__ == "__main__":
    main()
